"""What one dry run of the user's step has shown: integers and strings, no tensor.

A *region* is the part of the step from the entry of one block of the block list until the entry of the next. Region 0
holds the first block and everything before it, the last region everything after the last block as well. A *boundary*
is a number ``b``: a stage ends before block ``b`` and the next one begins with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A tensor among the arguments of a block that depends on parameters, and so must be sent where a stage begins.

    Attributes:
        tensor: its number in the recording; the same tensor at another block has the same number.
        paths: the places among the block's arguments where it stands, such as ``args[0]``.
        shape: in the recorded micro-batch.
        dtype: its name, such as ``torch.float32``.
        requires_grad: a gradient comes back for it.
        made: the region that has made it.
        written: the block writes to it in place.
    """

    tensor: int
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    made: int
    written: bool = False

    def __str__(self) -> str:
        size = ", ".join(map(str, self.shape))
        return f"{' = '.join(self.paths)} [{size}] {self.dtype.removeprefix('torch.')}"


@dataclass(frozen=True)
class BlockFacts:
    """One entry of the block list and its region.

    Attributes:
        name: its dotted name.
        slots: what must be sent if a stage begins here.
        bytes_in: bytes of all slots, in the recorded micro-batch.
        flops: floating-point operations of the region's forward.
        activation_bytes: what the region saves for its backward, in the recorded micro-batch.
        signature: equal for blocks that answer equal inputs with outputs of equal structure.
        written: somebody writes to its output in place.
    """

    name: str
    slots: tuple[Slot, ...]
    bytes_in: int
    flops: int
    activation_bytes: int
    signature: str
    written: bool = False


@dataclass(frozen=True)
class StateFacts:
    """A parameter or a buffer.

    Attributes:
        name: its first dotted name.
        aliases: further names of the same tensor.
        numel: elements.
        bytes: of these.
        regions: where operators use it; of an unused one, the region it is given to.
        used: an operator has used it.
        written: the regions that write what depends on them to it; empty for one that is only read.
    """

    name: str
    aliases: tuple[str, ...]
    numel: int
    bytes: int
    regions: tuple[int, ...]
    used: bool = True
    written: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModuleFacts:
    """A module with parameters outside the block list, as it was called.

    Attributes:
        name: its dotted name.
        first: the region of its first call.
        last: the region of its last call.
        whole: only its output leaves it, and all of that depends on parameters; so a stand-in can answer for it.
        written: somebody writes to its output in place.
    """

    name: str
    first: int
    last: int
    whole: bool
    written: bool = False


@dataclass(frozen=True)
class Skip:
    """A tensor of an earlier region that a later one uses, and that is no argument of the block in between.

    Attributes:
        made: the region that has made it.
        used: the region that uses it.
        maker: the operator and module that have made it.
        user: the operator and module that use it.
    """

    made: int
    used: int
    maker: str
    user: str


@dataclass(frozen=True)
class Recording:
    """Everything that splitting must know about a model and its step.

    Attributes:
        blocks: the entries of the block list, in the order in which they ran.
        parameters: all parameters, in order of registration.
        buffers: all buffers, in order of registration.
        modules: the called modules outside the block list that have parameters.
        skips: tensors that cross from one region to a later one outside the block's arguments.
        returned: path and region of each tensor that the step returns and that depends on parameters.
        logged: name and region of each value that the step logs and that depends on parameters.
    """

    blocks: tuple[BlockFacts, ...]
    parameters: tuple[StateFacts, ...]
    buffers: tuple[StateFacts, ...]
    modules: tuple[ModuleFacts, ...]
    skips: tuple[Skip, ...]
    returned: tuple[tuple[str, int], ...] = ()
    logged: tuple[tuple[str, int], ...] = ()

    def objection(self, boundary: int) -> str | None:
        """Return why no stage can begin with block ``boundary``, or None.

        Args:
            boundary: number of a block, from 1.
        """
        where = f"between {self.blocks[boundary - 1].name} and {self.blocks[boundary].name}"
        for skip in self.skips:
            if skip.made < boundary <= skip.used:
                return (
                    f"a skip connection runs {where}: {skip.user} uses what {skip.maker} has made, and that is not an "
                    f"argument of {self.blocks[boundary].name}"
                )
        sent = {slot.tensor for slot in self.blocks[boundary].slots}
        for block in self.blocks[boundary + 1 :]:
            for slot in block.slots:
                if slot.made < boundary and slot.tensor not in sent:
                    return (
                        f"a skip connection runs {where}: {slot.paths[0]} of {block.name} was made before, and is not "
                        f"an argument of {self.blocks[boundary].name}"
                    )
        for path, made in self.returned:
            if made < boundary:
                return f"a skip connection runs {where}: the step returns {path}, which was made before"
        for buffer in self.buffers:
            if buffer.written and min(buffer.regions) < boundary <= max(buffer.regions):
                return (
                    f"buffer {buffer.name!r} is used on both sides of the boundary {where} and written on one, so its "
                    "values would differ"
                )
        return None

    def allowed(self) -> tuple[int, ...]:
        """Return the numbers of the blocks that a stage can begin with, from 1."""
        return tuple(b for b in range(1, len(self.blocks)) if self.objection(b) is None)

    def __str__(self) -> str:
        """Return a table with a line for each region."""
        lines = ["block  parameters  saved bytes         flops  begins with"]
        for number, block in enumerate(self.blocks):
            own = sum(p.numel for p in self.parameters if number in p.regions)
            objection = self.objection(number) if number else None
            begins = objection or "; ".join(map(str, block.slots))
            lines.append(
                f"{number:5}  {own:10,}  {block.activation_bytes:11,}  {block.flops:12,}  {block.name}: {begins}"
            )
        return "\n".join(lines)
