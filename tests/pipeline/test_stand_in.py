"""Stand-ins take no memory, and what they are made from is found once for each shape."""

from __future__ import annotations

import collections
import dataclasses

import torch

from lit_zero.pipeline.leaves import call_leaves, leaves, map_leaves
from lit_zero.pipeline.stand_in import StandIns
from tests.pipeline.harness import divide, run
from tests.pipeline.models import Deep, on_tokens
from tests.pipeline.test_splitting import batches


def test_a_stand_in_takes_no_memory():
    make = StandIns()
    big = make.make((1000, 1000, 1000), torch.float32, torch.device("cpu"))
    assert big.shape == (1000, 1000, 1000) and big.untyped_storage().nbytes() == 4
    assert big[0, 0, 0].isnan() and make.made(big) and make.made(big.view(1000, -1)[3:])
    assert make.made(make.make((2,), torch.int64, torch.device("cpu")))
    assert make.make((2,), torch.int64, torch.device("cpu")).tolist() == [0, 0]
    other = make.make((2,), torch.float32, torch.device("cpu"))
    assert other is not make.make((2,), torch.float32, torch.device("cpu"))
    assert not make.made(torch.zeros(3))
    written = make.make_written((2, 3), torch.float32, torch.device("cpu"))
    written += 1
    assert not make.made(written) and other.isnan().all()


def test_shapes_are_found_once():
    """The three embeddings, positions and blocks of a stage ask once for each new shape, and blocks share it."""
    torch.manual_seed(0)
    stages = divide(Deep(), on_tokens, batches()[0], 4)
    runs = []
    for tokens in [*batches(), *batches()]:
        run(stages, on_tokens, tokens)
        runs.append(stages.splits[3].answers.dry_runs)
    assert runs == [2, 2, 4, 4, 4, 4]


@dataclasses.dataclass(frozen=True)
class Output:
    hidden: object
    other: object = None


Point = collections.namedtuple("Point", "x y")


def test_structures_stay_what_they_are():
    marker = object()
    value = {
        "list": [1, (2, Point(3, [4]))],
        "output": Output(5, marker),
        "ordered": collections.OrderedDict(a=6),
        "default": collections.defaultdict(list, b=7),
    }
    assert map_leaves(value, lambda path, leaf: leaf) is value
    changed = map_leaves(value, lambda path, leaf: leaf + 1 if isinstance(leaf, int) else leaf)
    assert changed["list"] == [2, (3, Point(4, [5]))] and isinstance(changed["list"][1][1], Point)
    assert changed["output"] == Output(6, marker)
    assert type(changed["ordered"]) is collections.OrderedDict and changed["ordered"]["a"] == 7
    assert type(changed["default"]) is collections.defaultdict and changed["default"]["b"] == 8
    assert value["output"].hidden == 5 and value["ordered"]["a"] == 6
    assert [path for path, _ in leaves(value)][:4] == [
        "['list'][0]",
        "['list'][1][0]",
        "['list'][1][1][0]",
        "['list'][1][1][1][0]",
    ]
    assert list(call_leaves((1,), {"mask": Output(2)})) == [
        ("args[0]", 1),
        ("kwargs['mask'].hidden", 2),
        ("kwargs['mask'].other", None),
    ]
    size = torch.Size([1, 2])
    assert map_leaves(size, lambda path, leaf: leaf) is size
