"""Every error that qwen3core raises on purpose; each message names the thing, what was expected, what was found."""


class Qwen3CoreError(ValueError):
    """Base of the family: catch this to catch all."""


class CheckpointError(Qwen3CoreError):
    """A checkpoint (config, safetensors, tokenizer) that is missing, broken, or not what it says."""


class InputError(Qwen3CoreError):
    """A text, an option or a tensor that the call cannot serve."""
