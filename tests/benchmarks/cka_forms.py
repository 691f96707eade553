"""CKA without rcid: the features, the unit of cost, and the plain Gram form. The peers' process imports it too."""
import torch


def features(n, layers=8, d=576):
    "Two stacks of layers that drift apart with depth and have a mean."
    g = torch.Generator().manual_seed(n)
    shared, noise = torch.randn(n, d, generator=g), lambda: torch.randn(n, d, generator=g)
    return tuple(torch.stack([shared + (0.2 + 0.3 * i) * noise() + 0.5 for i in range(layers)]) for _ in "xy")


def products(xs, ys):
    "The unit: the products X'Y of all pairs, which the feature form cannot do without."
    for x in xs:
        for y in ys: x.T @ y


def gram_form(xs, ys, dtype=torch.float32, centre=False):
    "Debiased CKA of all pairs from Gram matrices, one n x n matrix for each layer."
    grams = []
    for zs in (xs, ys):
        zs = zs.to(dtype)
        if centre: zs = zs - zs.mean(1, keepdim=True)
        grams.append([(z @ z.T).fill_diagonal_(0) for z in zs])
    n = xs.shape[1]
    def hsic(k, l):
        return ((k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) * l.sum(0)).sum()) / (
            n * (n - 3)
        )

    own = [[hsic(k, k) for k in ks] for ks in grams]
    return torch.tensor(
        [
            [float(hsic(k, l) / (own[0][i] * own[1][j]).sqrt()) for j, l in enumerate(grams[1])]
            for i, k in enumerate(grams[0])
        ],
        dtype=torch.float64,
    )
