"""The steps of the streaming learners in NumPy, one parameter at a time, as their formulas are written."""

import numpy as np
import torch


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def draw(generator, shapes):
    """Draw the noise of one step: all numbers at once, in the order of the parameters."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    numbers = torch.empty(sum(sizes), dtype=torch.float64).normal_(generator=generator).numpy()
    parts = np.split(numbers, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


class Oracle:
    """What a learner does to the parameters of one network.

    Args:
        weights: The parameters.
        options: The hyper-parameters, as numbers and words.
        seed: Seed of the noise; None for none.
    """

    def __init__(self, weights, options, seed=None):
        self.weights = [np.array(w, np.float64) for w in weights]
        self.traces = {}
        self.t = 0
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        vars(self).update(options)

    def noise(self):
        return draw(self.generator, [w.shape for w in self.weights])

    def ema(self, name, values, beta):
        """Update running means that began with 0, and return them without and with the correction of the bias."""
        old = self.traces.get(name, [0 * value for value in values])
        new = self.traces[name] = [beta * m + (1 - beta) * value for m, value in zip(old, values, strict=True)]
        return new, [m / (1 - beta**self.t) for m in new]

    def step(self, grads, curvature=None):
        self.t += 1
        self.weights = self.stepped([np.array(g) for g in grads], curvature)


class Sgd(Oracle):
    def stepped(self, grads, _):
        return [w - self.lr * (g + self.weight_decay * w) for w, g in zip(self.weights, grads, strict=True)]


class Pgd(Oracle):
    def stepped(self, grads, _):
        every = zip(self.weights, grads, self.noise(), strict=True)
        return [w - self.lr * (g + self.sigma * xi) for w, g, xi in every]


class ShrinkPerturb(Oracle):
    def stepped(self, grads, _):
        every = zip(self.weights, grads, self.noise(), strict=True)
        return [(1 - self.lr * self.decay) * w - self.lr * (g + self.sigma * xi) for w, g, xi in every]


class Adam(Oracle):
    def stepped(self, grads, _):
        _, means = self.ema("mean", grads, self.beta1)
        _, squares = self.ema("square", [g**2 for g in grads], self.beta2)
        every = zip(self.weights, means, squares, strict=True)
        return [w - self.lr * self.weight_decay * w - self.lr * m / (np.sqrt(v) + self.eps) for w, m, v in every]


class Upgd(Oracle):
    """UPGD with all its options; see the docstring of `ntkgen.continual.optim.UPGD`."""

    def utilities(self, grads, curvature):
        if self.order == "first":
            return [-g * w for g, w in zip(grads, self.weights, strict=True)]
        every = zip(grads, self.weights, curvature, strict=True)
        return [-g * w + 0.5 * h * w**2 for g, w, h in every]

    def scaled(self, values):
        """The scaled utilities s."""
        raw, corrected = self.ema("utility", values, self.beta_utility)
        if self.normalisation == "global":
            eta = max(u.max() for u in (raw if self.largest == "raw" else corrected))
            return [sigmoid(u / eta) if eta > 0 else np.full(u.shape, 0.5) for u in corrected]
        rows = [np.atleast_1d(u) for u in corrected]
        rows = [u / np.maximum(np.linalg.norm(u, axis=-1, keepdims=True), 1e-12) for u in rows]
        return [sigmoid(row).reshape(u.shape) for row, u in zip(rows, corrected, strict=True)]

    def shared(self, s):
        if s.ndim != 4 or self.utility_shape == "element":
            return s
        if self.utility_shape == "column":
            return np.broadcast_to(s.mean(2, keepdims=True), s.shape)
        kernel = np.broadcast_to(s.mean((2, 3), keepdims=True), s.shape)
        return kernel if self.utility_shape == "kernel" else (1 - self.mixture) * s + self.mixture * kernel

    def factor(self, w, g):
        norms = {"w": np.sqrt((w**2).sum()) + 1e-8, "g": np.sqrt((g**2).sum()) + 1e-8}
        by = {"none": 1.0, "weight": norms["w"], "grad": norms["g"], "ratio": norms["g"] / norms["w"]}
        return by[self.noise_scale]

    def stepped(self, grads, curvature):
        s = [self.shared(each) for each in self.scaled(self.utilities(grads, curvature))]
        new = []
        for w, g, own, normal in zip(self.weights, grads, s, self.noise(), strict=True):
            xi = self.sigma * self.factor(w, g) * normal
            if not self.gate_noise:
                direction = g * (1 - own) + xi
            elif self.protecting:
                direction = (g + xi) * (1 - own)
            else:
                direction = g + xi * (1 - own)
            new.append((1 - self.lr * self.weight_decay) * w - self.step_scale * self.lr * direction)
        return new


class AdaptiveUpgd(Upgd):
    order, normalisation = "first", "global"

    def stepped(self, grads, curvature):
        s = self.scaled(self.utilities(grads, None))
        _, means = self.ema("mean", grads, self.beta1)
        _, squares = self.ema("square", [g**2 for g in grads], self.beta2)
        new = []
        for w, m, v, own, normal in zip(self.weights, means, squares, s, self.noise(), strict=True):
            direction = (m / (np.sqrt(v) + self.eps) + self.sigma * normal) * (1 - own)
            new.append((1 - self.lr * self.weight_decay) * w - self.step_scale * self.lr * direction)
        return new


class Ewc(Oracle):
    """Online EWC; MAS with the absolute value."""

    importance = staticmethod(np.square)

    def stepped(self, grads, _):
        _, anchors = self.ema("weight", self.weights, self.beta_weight)
        _, fishers = self.ema("fisher", [self.importance(g) for g in grads], self.beta_fisher)
        every = zip(self.weights, grads, anchors, fishers, strict=True)
        return [w - self.lr * (g + self.kappa * f * (w - anchor)) for w, g, anchor, f in every]


class Mas(Ewc):
    importance = staticmethod(np.abs)


class Si(Oracle):
    published = False

    def moved(self):
        start = [0 * w for w in self.weights] if self.published else self.weights
        before = self.traces.get("previous", start)
        self.traces["previous"] = self.weights
        return [old - w for old, w in zip(before, self.weights, strict=True)]

    def importances(self, grads):
        moved = self.moved()
        _, omega = self.ema("omega", [g * d for g, d in zip(grads, moved, strict=True)], self.beta_importance)
        _, delta = self.ema("delta", moved, self.beta_importance)
        return [o / (d**2 + self.eps) for o, d in zip(omega, delta, strict=True)]

    def stepped(self, grads, _):
        _, anchors = self.ema("weight", self.weights, self.beta_weight)
        every = zip(self.weights, grads, anchors, self.importances(grads), strict=True)
        return [w - self.lr * (g + self.kappa * omega * (w - anchor)) for w, g, anchor, omega in every]


class Rwalk(Si):
    def importances(self, grads):
        moved = self.moved()
        zeros = [0 * g for g in grads]
        fisher_before = self.traces.get("fisher", zeros)
        squared = self.weights if self.published else grads
        _, fisher = self.ema("fisher", [each**2 for each in squared], self.beta_importance)
        used = fisher_before if self.published else fisher
        every = zip(grads, moved, used, strict=True)
        found = [np.maximum(g * d / (0.5 * f * d**2 + self.eps), 0) for g, d, f in every]
        before = zeros if self.published else self.traces.get("score", zeros)
        score = self.traces["score"] = [(old + new) / 2 for old, new in zip(before, found, strict=True)]
        return [f + each for f, each in zip(fisher, score, strict=True)]


ORACLES = {
    "SGD": Sgd,
    "PGD": Pgd,
    "ShrinkAndPerturb": ShrinkPerturb,
    "Adam": Adam,
    "UPGD": Upgd,
    "AdaptiveUPGD": AdaptiveUpgd,
    "OnlineEWC": Ewc,
    "MAS": Mas,
    "SI": Si,
    "RWalk": Rwalk,
}


def feature_step(names, weights, grads, curvature, t, state, options):
    """Take a step of feature UPGD. ``state`` has the traces of the gates, and the source of noise."""
    traces, generator = state
    beta, lr, decay = options["beta_utility"], options["lr"], options["weight_decay"]
    gates = [index for index, name in enumerate(names) if name.endswith("gate")]
    corrected = {}
    for index in gates:
        utility = -grads[index] * weights[index]
        if options["order"] == "second":
            utility = utility + 0.5 * curvature[index] * weights[index] ** 2
        traces[index] = beta * traces.get(index, 0 * utility) + (1 - beta) * utility
        corrected[index] = traces[index] / (1 - beta**t)
    eta = max((traces if options["largest"] == "raw" else corrected)[index].max() for index in gates)
    noise = draw(generator, [w.shape for w in weights])
    new = list(weights)
    for index, (w, g) in enumerate(zip(weights, grads, strict=True)):
        if index in gates:
            continue
        gate = next((other for other in gates if other in {index + 1, index + 2}), None)
        direction = g
        if gate is not None:
            u = corrected[gate]
            scaled = u / eta if options["normalisation"] == "global" and eta > 0 else 0 * u
            if options["normalisation"] == "local":
                scaled = u / max(np.linalg.norm(u), 1e-12)
            free = (1 - sigmoid(scaled)).reshape(-1, *[1] * (w.ndim - 1))
            xi = options["sigma"] * noise[index]
            direction = (g + xi) * free if options["protecting"] else g + xi * free
        new[index] = (1 - lr * decay) * w - lr * direction
    return new
