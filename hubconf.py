"""Entry point of PyTorch Hub: `torch.hub.load(path, "advanced_cnn", weights="fast", source="local")`."""

from pathlib import Path as _Path  # torch.hub.list shows the callables without an underscore

from model_AC import AdvancedCNN as _AdvancedCNN
from session8.checkpoint import load_model as _load_model

dependencies = ["torch", "numpy", "safetensors"]
WEIGHTS = ("fast", "accurate")


def advanced_cnn(weights: str | None = None, **arguments) -> _AdvancedCNN:
    """Return an AdvancedCNN.

    weights: "fast" or "accurate" for the network that was trained on CIFAR-10 with this recipe, in evaluation mode;
    None for a new one, made with `arguments`: num_classes, dropout, width.

    Raises ValueError for other weights, or if arguments are given with weights, whose network is fixed.
    """
    if weights is None:
        return _AdvancedCNN(**arguments)
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; expected one of {', '.join(map(repr, WEIGHTS))}, or None")
    if arguments:
        raise ValueError(f"weights={weights!r} fixes the network: leave out {', '.join(arguments)}")
    name = f"AdvancedCNN_{weights}_seed0_bfloat16.safetensors"
    model, _ = _load_model(_Path(__file__).resolve().parent / "results" / name)
    return model
