"""The canonical names of the operations beside a conv in a graph, as recipes use them."""

import re

ACTIVATIONS = frozenset([
    "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "softmax",
    "hardswish", "hardsigmoid", "hardtanh",
])  # fmt: skip
"""What the word `activation` in a recipe stands for."""

OTHERS = frozenset([
    "add", "mul", "sub", "div", "concat", "conv", "conv_transpose", "linear", "batch_norm", "layer_norm", "group_norm",
    "max_pool", "avg_pool", "dropout", "identity", "interpolate", "flatten", "reshape", "permute", "mean", "input",
    "output",
])  # fmt: skip
"""Names that are no activation. An operation outside of both sets goes by its own name."""

WORDS = ACTIVATIONS | OTHERS | {"activation"}

_SAME = {
    "iadd": "add", "isub": "sub", "imul": "mul", "truediv": "div", "itruediv": "div", "cat": "concat",
    "concatenate": "concat", "swish": "silu", "view": "reshape", "upsample": "interpolate",
    "frozen_batch_norm": "batch_norm", "sync_batch_norm": "batch_norm", "feature_dropout": "dropout",
    "stochastic_depth": "dropout",
}  # fmt: skip


def canonical(name: str) -> str:
    """Return the canonical name of a module class, function or method: `BatchNorm2d` is `batch_norm`."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()
    snake = re.sub(r"_?[123]d$", "", snake).removeprefix("adaptive_").strip("_")
    return _SAME.get(snake, snake)
