"""Which models train on a minibatch, in each pass over the buffer. Pure."""

POLICY, CRITIC = "policy", "critic"


def optimizer_steps(
    ppo_epochs: int, critic_epochs: int, critic_updates: int, with_policy: bool = True, with_critic: bool = True
) -> list[list[tuple[str, ...]]]:
    """Returns for each pass over the buffer, for each optimizer step on a minibatch, the models that it changes.

    critic_epochs: passes of the critic, the first ppo_epochs of them together with the policy; 0: ppo_epochs.
    critic_updates: steps of the critic on a minibatch, the first of them together with the policy's.
    """
    policy_epochs = ppo_epochs if with_policy else 0
    critic_epochs = (critic_epochs or ppo_epochs) if with_critic else 0
    passes = []
    for epoch in range(max(policy_epochs, critic_epochs)):
        names = (POLICY,) * (epoch < policy_epochs) + (CRITIC,) * (epoch < critic_epochs)
        passes.append([names] + [(CRITIC,)] * (critic_updates - 1) * (CRITIC in names))
    return passes
