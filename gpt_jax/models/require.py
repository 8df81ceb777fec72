"""How a value of the model section is refused.  Starts no JAX."""


def require(holds: bool, name: str, value, right: str) -> None:
    """Raises ValueError unless it holds: "model.NAME: VALUE is not RIGHT"."""
    if not holds:
        raise ValueError(f"model.{name}: {value!r} is not {right}")
