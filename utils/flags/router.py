"""The flag of stages that train mixture-of-experts models. No torch."""

from dataclasses import dataclass

from utils.flags.checks import check_range
from utils.flags.engine import ForwardConfig


@dataclass
class RouterFlags(ForwardConfig):
    """Losses: what is added to the main loss."""

    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture-of-experts model's routers; 0: no such loss and no metrics of
    routers. Default: router_aux_loss_coef of the model's config.json"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_aux_loss_coef is not None:
            check_range(self, router_aux_loss_coef=(0, None))
