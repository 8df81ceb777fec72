"""The shape of the device mesh: a frozen, validated dataclass.  Starts no JAX."""

import dataclasses
import math

# In the order of the mesh, whose last axes are neighbours: what is sent most often goes least far.
AXES = ("data", "stage", "fsdp", "expert", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all the devices that are left.

    Attributes:
      data: Copies of the model, each with its share of the batch.
      fsdp: Shares of the batch that also split the parameters (arXiv:1910.02054).
      tensor: Splits heads, MLP width and vocabulary (arXiv:1909.08053).
      sequence: Splits the tokens of a row, for long ones: queries see the keys of all devices.
      expert: Shares of the batch that also split the experts of mixture-of-experts layers
        (arXiv:2006.16668).
      stage: Splits the layers, which then run as a pipeline (arXiv:1811.06965).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    stage: int = 1

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
            given = {axis: getattr(self, axis) for axis in AXES}
            product = " x ".join(f"{axis} {n}" for axis, n in given.items() if n != 1) or "data 1"
            raise ValueError(
                f"mesh: {product} does not fit the devices: {num_devices} here; the product of "
                "the sizes must be that number (-1 takes what is left)"
            )
        return tuple(sizes)
