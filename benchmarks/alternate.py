"""Time two implementations of the same steps in alternation, each in its own process.

Alternating steps exposes both to the same load of the machine; separate processes have separate memory peaks. If both
do not fit on the device together, the processes run one after the other (`apart`).
"""

from collections.abc import Callable
from multiprocessing import get_context

Steps = Callable[..., None]  # steps(connection, *arguments), see `measure`


def measure(
    sides: list[Steps], arguments: tuple, tokens: list[int], apart: bool = False
) -> list[tuple[list[float], float]]:
    """Returns per side (tokens per second of each step except the first, peak GiB). tokens: useful tokens per step.

    A side receives a message before each step and answers with its seconds; after the last step it receives "end" and
    answers with its peak memory. It must not use the device before the first message. apart: do not alternate.
    """
    context, running = get_context("spawn"), []
    for steps in sides:
        here, there = context.Pipe()
        process = context.Process(target=steps, args=(there, *arguments), daemon=True)
        process.start()
        there.close()  # otherwise recv() waits for ever if the process dies
        running.append((here, process, []))
    results = []
    for group in [[side] for side in running] if apart else [running]:
        for count in tokens:
            for connection, _, rates in group:
                connection.send("step")
                rates.append(count / connection.recv())
        for connection, process, rates in group:
            connection.send("end")
            results.append((rates[1:], connection.recv()))
            process.join()
    return results
