"""The flag of stages that train mixture-of-experts models. No torch: a wrong flag is answered at once."""

from dataclasses import dataclass

from utils.flags.checks import check_range
from utils.flags.engine import ForwardConfig


@dataclass
class RouterFlags(ForwardConfig):
    """How the routers of a mixture of experts are trained."""

    router_aux_loss_coef: float | None = None
    """Mixture-of-experts models: weight of the routers' load-balancing loss; default: the router_aux_loss_coef of the
    model's config.json. 0: without this loss and the metrics of routers"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_aux_loss_coef is not None:
            check_range(self, router_aux_loss_coef=(0, None))
