"""Run a recipe with FSDP2 on the CPU, under torchrun, which accelerate does on devices only.

So it is told that the processes have one each, and `train`, which refuses a CPU, is asked behind
its back.
"""

import sys

import accelerate.state
from accelerate.utils import DistributedType

from dynmask.train import run
from dynmask.train.recipe import Recipe

STATE = accelerate.state.PartialState
begin = STATE.__init__


def pretend(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if STATE._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        STATE._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    recipe, data, out = sys.argv[1:]
    STATE.__init__ = pretend
    plain = run.training_arguments
    run.training_arguments = lambda *args, **kwargs: plain(*args, **(kwargs | {"fsdp": True}))
    run.train(Recipe.load(recipe), out, data=data, workers=0)
