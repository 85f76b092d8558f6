"""How masks are computed: one public function, several backends."""

from dynmask.ops.attention import attention, choose, supports
from dynmask.ops.bounded import BoundedKeys
from dynmask.ops.cpu import computed_pairs

__all__ = ["BoundedKeys", "attention", "choose", "computed_pairs", "supports"]
