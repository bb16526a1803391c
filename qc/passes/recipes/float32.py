"""f32: nothing is quantized; the baseline of every comparison."""

import torch

from qc.passes.prepare.explicit_cache import ExplicitCache
from qc.passes.recipes.recipe import Recipe

F32 = Recipe("f32", (ExplicitCache(torch.float32),))
