"""iCaRL: distillation, exemplars, and classification by the nearest mean of exemplars."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkgen.continual.chance import generator_of
from ntkgen.continual.exemplars import choose, quota
from ntkgen.continual.heads import features_of, head_of, in_evaluation_mode
from ntkgen.continual.methods.lwf import LwFMC
from ntkgen.continual.methods.method import Situation
from ntkgen.continual.streams.tasks import IntArray, Task

# Samples whose features are computed at a time.
FEATURE_BATCH = 500


class ICaRL(LwFMC):
    """Trains on new samples and exemplars with the loss of LwF.MC, and predicts the nearest mean of exemplars.

    The memory has K / t exemplars of each of the t classes seen so far, rounded down, chosen by herding or at random
    after each task. The mean of a class is that of the normalised features of its exemplars, normalised.
    A new class has no exemplars while its task is in training. Its mean is then that of all its training samples.

    The authors' code rounds up, so that the memory may have up to t − 1 samples more than K, and adds the features of
    the mirrored exemplars to the mean. Both are options.

    References:
        Rebuffi, Kolesnikov, Sperl, Lampert (2017), arXiv:1611.07725.

    Raises:
        ModelError: If the network has no head.
    """

    def __init__(self, situation: Situation) -> None:
        super().__init__(situation)
        if situation.inputs is not None:  # there is a network
            self.head = head_of(situation.model, situation.num_outputs or situation.stream.num_targets)
        quota(situation.options.buffer, situation.stream.num_targets)  # refuses a budget that will be too small
        self.exemplars: dict[int, list[int]] = {}  # by target
        self.current = 0  # the task in training
        self.means: dict[int, Tensor] = {}  # by target

    def begin(self, task: Task, model: nn.Module) -> None:
        """Freeze the teacher."""
        super().begin(task, model)
        self.current = task.number

    def epoch_ids(self, task: Task, epoch: int) -> IntArray:
        """List the samples of the task and all exemplars in random order."""
        kept = [sample for ids in self.exemplars.values() for sample in ids]
        return self.shuffled(np.concatenate([task.train, np.array(kept, np.int64)]), task, epoch)

    def end(self, task: Task, model: nn.Module) -> None:
        """Shorten the lists of old classes, and choose exemplars of the new ones."""
        options = self.situation.options
        count = quota(options.buffer, self.situation.stream.num_seen(task.number), options.exemplar_rounding)
        self.exemplars = {target: ids[:count] for target, ids in self.exemplars.items()}
        for target, ids in self._new_classes(task.number).items():
            rng = generator_of(self.situation.seed, "memory", target)
            features = self._features(model, ids).double().cpu().numpy()
            self.exemplars[target] = choose(options.exemplars, ids, features, count, rng).tolist()

    def before_evaluation(self, model: nn.Module) -> None:
        """Compute the means of all classes so far with the current features."""
        members = {target: np.array(ids) for target, ids in self.exemplars.items()} | self._new_classes(self.current)
        self.means = {target: nn.functional.normalize(self._mean(model, ids), dim=0) for target, ids in members.items()}

    def predict(
        self,
        model: nn.Module,
        x: Tensor,  # (samples, …)
        outputs: Tensor,  # (samples, outputs)
    ) -> Tensor:  # (samples, outputs)
        """Score a class by the negative distance of the features from its mean."""
        features = features_of(model, self.head, x)
        scores = features.new_full(outputs.shape, -torch.inf)
        scores[:, list(self.means)] = -torch.cdist(features, torch.stack(list(self.means.values())).to(features))
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher, the exemplars and the task in training."""
        exemplars = {str(target): ids for target, ids in self.exemplars.items()}
        return {**super().state_dict(), "exemplars": exemplars, "current": self.current}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        super().load_state_dict(state)
        self.current = int(state["current"])
        self.exemplars = {int(target): list(ids) for target, ids in state["exemplars"].items()}

    def _new_classes(self, task: int) -> dict[int, IntArray]:
        """List the training samples of the classes of a task that have no exemplars yet."""
        stream, ids = self.situation.stream, self.situation.stream.tasks[task].train
        targets = stream.targets(self.situation.labels[ids])
        return {target: ids[targets == target] for target in stream.task_targets(task) if target not in self.exemplars}

    def _mean(self, model: nn.Module, ids: IntArray) -> Tensor:
        mean = self._features(model, ids).mean(0)
        return mean + self._features(model, ids, mirrored=True).mean(0) if self.situation.options.mirrored else mean

    def _features(self, model: nn.Module, ids: IntArray, *, mirrored: bool = False) -> Tensor:
        assert self.situation.inputs is not None
        parts = (self.situation.inputs(part) for part in torch.from_numpy(ids).split(FEATURE_BATCH))
        return torch.cat([in_evaluation_mode(model, x.flip(-1) if mirrored else x, self.head) for x in parts])
