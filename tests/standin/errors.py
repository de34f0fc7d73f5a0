"""What can go wrong with a kernel, as Metal would (or would not) tell."""


class MetalError(RuntimeError):
    """A kernel did something that Metal forbids or leaves undefined."""


class MetalCompileError(MetalError):
    """Metal's compiler would reject the source."""


class MetalTimeout(MetalError):
    """A launch took longer than the time limit: on a GPU, a hang or the watchdog."""
