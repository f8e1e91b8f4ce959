"""Small models that load weights in the ways that SGLang's do: those that can be replayed, and those that cannot."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

Weights = list[tuple[str, torch.Tensor]]

ROWS, COLUMNS = 4, 6
SHAPE = (ROWS, COLUMNS)


class Model(nn.Module):
    """Two tensors, ``q`` and ``k``, fused in one parameter, and a ``norm``."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(2 * ROWS, COLUMNS), requires_grad=False)
        self.norm = nn.Parameter(torch.zeros(COLUMNS), requires_grad=False)
        self.register_buffer("cos", torch.ones(3))

    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            self.load_one(name, weight)

    def load_one(self, name: str, weight: torch.Tensor) -> None:
        if name in ("q", "k"):
            self.qk.data.narrow(0, 0 if name == "q" else ROWS, ROWS).copy_(weight)
        else:
            self.norm.data.copy_(weight)


class Transposing(Model):
    def load_one(self, name: str, weight: torch.Tensor) -> None:
        super().load_one(name, weight.view(COLUMNS, ROWS).t() if name == "q" else weight)


class Padding(Model):
    """As a vocabulary is padded."""

    def load_one(self, name: str, weight: torch.Tensor) -> None:
        if name == "k":
            self.qk.data[ROWS:].fill_(0.5)
            self.qk.data[ROWS : ROWS + 2].copy_(weight[:2])
            self.qk.data[ROWS + 2 :].copy_(weight[2:])
        else:
            super().load_one(name, weight)


class Tied(Model):
    """``norm`` has two names; the last one to come counts."""

    def load_one(self, name: str, weight: torch.Tensor) -> None:
        super().load_one(name, weight)
        if name == "q":
            self.norm.data.copy_(weight[0])


class Sharding(Model):
    """The second of two ranks' half of the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(2 * ROWS, COLUMNS // 2), requires_grad=False)

    def load_one(self, name: str, weight: torch.Tensor) -> None:
        super().load_one(name, weight if name == "norm" else weight.narrow(1, COLUMNS // 2, COLUMNS // 2))


class Skipping(Model):
    """Does not know ``k``."""

    def load_one(self, name: str, weight: torch.Tensor) -> None:
        if name != "k":
            super().load_one(name, weight)


class Joining(Model):
    """As q_a and kv_a are fused."""

    def load_weights(self, weights: Weights) -> None:
        found = dict(weights)
        self.qk.data.copy_(torch.cat([found["q"], found["k"]]))
        self.norm.data.copy_(found["norm"])


class MakingContiguous(Model):
    def load_one(self, name: str, weight: torch.Tensor) -> None:
        super().load_one(name, weight if name == "norm" else weight.view(COLUMNS, ROWS).t().contiguous())


class Casting(Model):
    def load_one(self, name: str, weight: torch.Tensor) -> None:
        super().load_one(name, weight.to(torch.float64))


class Cloning(Model):
    def load_one(self, name: str, weight: torch.Tensor) -> None:
        super().load_one(name, weight.clone())


class ReadingANumber(Model):
    """As parameters of one element are loaded."""

    def load_one(self, name: str, weight: torch.Tensor) -> None:
        super().load_one(name, weight)
        if name == "norm":
            self.cos.fill_(weight[0].item())  # type: ignore[operator]


class Deriving(Model):
    """As MLA's w_kc and w_vc, which are plain attributes."""

    derived: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.derived = torch.zeros(SHAPE)

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.derived.copy_(self.qk.data[:ROWS] * 2)


class DerivingAnew(Deriving):
    """The same, into a new tensor each time."""

    def load_weights(self, weights: Weights) -> None:
        Model.load_weights(self, weights)
        self.derived = self.qk.data[:ROWS] * 2


class CopyingWithin(Model):
    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.qk.data[0].copy_(self.norm.data)


class Accumulating(Model):
    def load_one(self, name: str, weight: torch.Tensor) -> None:
        self.norm.data.add_(1)
        super().load_one(name, weight)


class Keeping(Model):
    """Holds on to what it was given."""

    kept: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(1)

    def load_one(self, name: str, weight: torch.Tensor) -> None:
        super().load_one(name, weight)
        self.kept = weight


class InThreads(Model):
    """As some loaders treat tensors on the CPU."""

    def load_weights(self, weights: Weights) -> None:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(self.load_one, name, weight) for name, weight in weights]:
                done.result()


class DerivingInAThread(Deriving):
    """What only a first replay can show: nothing of the bucket, and nothing in the thread that is watched."""

    def load_weights(self, weights: Weights) -> None:
        Model.load_weights(self, weights)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: self.derived.copy_(self.qk.data[:ROWS] * 2)).result()


class Quantised(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(4, dtype=torch.int8))


class Moving(Model):
    """Its memory is new after ``move``."""

    def move(self) -> None:
        self.qk.data = self.qk.data.clone()


class Refusing(Model):
    """Takes nothing but ordinary tensors."""

    def load_one(self, name: str, weight: torch.Tensor) -> None:
        if type(weight) is not torch.Tensor:
            raise TypeError("an ordinary tensor is wanted")
        super().load_one(name, weight)


class Failing(Model):
    def load_one(self, name: str, weight: torch.Tensor) -> None:
        raise KeyError(name)


REPLAYED = [Model, Transposing, Padding, Tied]
REFUSED = {
    Skipping: "has read 0 of the 96 bytes of k",
    Joining: "does more with its weights than to copy them (aten.cat.default)",
    MakingContiguous: "does more with its weights than to copy them (aten.clone.default)",
    Casting: "does more with its weights than to copy them (aten._to_copy.default)",
    Cloning: "does more with its weights than to copy them (aten.clone.default)",
    ReadingANumber: "does more with its weights than to copy them (aten._local_scalar_dense.default)",
    Deriving: "does more with its weights than to copy them (aten.mul.Tensor)",
    DerivingAnew: "does more with its weights than to copy them (aten.mul.Tensor)",
    CopyingWithin: "writes weights that do not come from the bucket",
    Accumulating: "does more with its weights than to copy them (aten.add_.Tensor)",
    Keeping: "keeps a tensor of the bucket",
    InThreads: "loads in a thread of its own",
    Quantised: "holds torch.int8",
    Refusing: "cannot be observed (TypeError: an ordinary tensor is wanted)",
}
