"""The shape of the device mesh: a frozen, validated dataclass.  Starts no JAX."""

import dataclasses
import math

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all the devices that are left.

    Attributes:
      data: Copies of the model, each with its share of the batch.
      fsdp: Shares of the batch that also split the parameters (arXiv:1910.02054).
      tensor: Splits heads, MLP width and vocabulary (arXiv:1909.08053).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{name}: {size!r} is not -1 or at least 1")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh: {sizes} has more than one -1; give all sizes but one")

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """The sizes with -1 filled in.  Raises ValueError if they do not fit the devices."""
        sizes = [getattr(self, axis) for axis in AXES]
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        if math.prod(sizes) != num_devices:
            product = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)
            raise ValueError(
                f"mesh: {product} does not fit the devices: {num_devices} here; the product of "
                "the sizes must be that number (-1 takes what is left)"
            )
        return tuple(sizes)
