"""Run a recipe with FSDP2 on the CPU, under torchrun, which accelerate does on devices only.

So it is told that the processes have one each, and `train`, which refuses a CPU, is asked behind
its back; with a fourth argument, in bfloat16. Prints the policies that modules are sharded by.
"""

import sys
from functools import partial

import accelerate.state
import torch.distributed.fsdp
from accelerate.utils import DistributedType

from dynmask.train import arguments, run
from dynmask.train.recipe import Recipe

STATE = accelerate.state.PartialState
begin = STATE.__init__


def pretend(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if STATE._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        STATE._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def told_bf16(kind, **settings):
    return kind(**(settings | {"bf16": True}))


def noted(module, **how):
    policies.add(how["mp_policy"])
    return shard(module, **how)


if __name__ == "__main__":
    recipe, data, out, *low = sys.argv[1:]
    STATE.__init__ = pretend
    plain = run.training_arguments
    run.training_arguments = lambda *args, **kwargs: plain(*args, **(kwargs | {"fsdp": True}))
    if low:
        arguments.TrainingArguments = partial(told_bf16, arguments.TrainingArguments)
    shard, policies = torch.distributed.fsdp.fully_shard, set()
    torch.distributed.fsdp.fully_shard = noted
    run.train(Recipe.load(recipe), out, data=data, workers=0)
    print(*policies, sep="\n")
