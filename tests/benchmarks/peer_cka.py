"""torch_cka and ckatorch on the features of cka.py. Run by cka.py in their environment."""
import json, sys, warnings
from importlib.metadata import version
import torch
from cka_forms import features, products
from ckatorch.core import cka_batch
from common import in_units_of
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_cka import CKA

warnings.simplefilter("ignore")
folder, out = sys.argv[1:]
reference, rows = load_file(f"{folder}/reference.safetensors"), []


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value
    def forward(self, x): return self.value


class Stored(nn.Module):
    "A model whose layers return stored features."
    def __init__(self, values):
        super().__init__()
        self.layers = nn.ModuleList(Returns(v) for v in values)
    def forward(self, x):
        for layer in self.layers: layer(x)
        return x


def of_torch_cka(xs, ys):
    names = [[f"layers.{i}" for i in range(len(zs))] for zs in (xs, ys)]
    cka = CKA(Stored(xs), Stored(ys), model1_name="x", model2_name="y", model1_layers=names[0], model2_layers=names[1])
    cka.compare(DataLoader(TensorDataset(torch.zeros(xs.shape[1], 1)), batch_size=xs.shape[1]))
    return cka.export()["CKA"]


# as its CKA class does
def of_ckatorch(xs, ys): return torch.stack([torch.stack([cka_batch(x[None], y[None]) for y in ys]) for x in xs])


with torch.no_grad():
    # at 2048 one layer against eight, times eight
    for n, used in ((512, 8), (2048, 1)):
        xs, ys = features(n)
        for name, package, f in (("torch_cka", "torch-cka", of_torch_cka), ("ckatorch", "ckatorch", of_ckatorch)):
            cost, _, got = in_units_of(lambda: products(xs, ys), lambda: f(xs[:used], ys), 1 if n > 1000 else 3)
            rows.append(
                dict(
                    n=n,
                    tool=f"{name} {version(package)}",
                    cost=cost * 8 / used,
                    error=float((got.double() - reference[str(n)][:used]).abs().max()),
                    measured_pairs=8 * used,
                )
            )
json.dump(rows, open(out, "w"))
