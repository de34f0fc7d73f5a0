"""The error that a user can cause: bad paths, files, flags. The command line prints it as one line."""


class InputError(ValueError):
    """What the caller gave cannot be used; the message says in one line what, and what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", " "))  # what came may be an array, or a name with line breaks


def about_import(error: ImportError) -> str:
    """What to install, for an import that failed."""
    if "libmlx" in str(error):
        return (
            "MLX's library is missing: on Linux it comes with one of three extras: pip install "
            "'mlx-hla[cpu]', or for an NVIDIA GPU 'mlx-hla[cuda12]' or 'mlx-hla[cuda13]'"
        )
    if (error.name or "").split(".")[0] == "mlx":
        return "MLX is not installed: pip install mlx-hla, on Linux 'mlx-hla[cpu]' or 'mlx-hla[cuda13]'"
    if (error.name or "").split(".")[0] in ("mlx_lm", "transformers"):
        return "mlx-lm is missing or of another version: pip install 'mlx-hla[lm]'"
    return f"{error} (is mlx-hla installed whole?)"
