"""One object of each kind that a refused call might change, and a fingerprint of their contents."""

import contextlib
import functools

import torch
from matplotlib.figure import Figure
from torch import nn

import spectralmetrics as sm
from spectralmetrics.functional import Observations, accumulate, empty_moments


class World:
    """One object of each kind, with observations.

    Args:
        folder: an empty folder for runs.
    """

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder = folder
        self.rows = torch.randn(40, 3)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        self.convolutions = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
        self.fields = sm.receptive_fields(self.convolutions, torch.zeros(1, 1, 8, 8))
        self.run, self.table, self.empty = folder / "run", folder / "table", folder / "empty"
        self.empty.mkdir()
        for directory, writers in ((self.run, ["csv", "arrays"]), (self.table, ["csv"])):
            with self._probe() as probe, sm.Recorder(directory, probe, writers) as recorder:
                for _ in range(2):
                    self._run_the_model()
                    recorder.record()
        self.probe = self._probe()
        self.similarity = sm.LayerSimilarity(self.model)
        self._run_the_model()
        self.compared = self.similarity.compute()
        self.recorder = sm.Recorder(folder / "open", self.probe, ["csv", "arrays"])
        self.recorder.add_scalar("loss", 0.5)
        self.metric, self.folded = sm.CovarianceMetric(), sm.SaturationMetric(folds=2)
        self.embedding, self.pair = sm.EigenspaceEmbeddingMetric(), sm.LinearCKAMetric()
        for metric in (self.metric, self.folded, self.embedding):
            metric.update(self.rows)
        self.pair.update(self.rows, self.rows[:, :2])
        with sm.LayerProbe(self.model, sm.HistoryMetric()) as probe:
            self._run_the_model()
            self.history = probe.history("train" if self.model.training else "eval")
        self.unseen = nn.Sequential(nn.Linear(4, 3), sm.PCAProjection(3))
        self.projected = nn.Sequential(nn.Linear(4, 3), sm.PCAProjection(3))
        self.projected(torch.randn(40, 4))
        self.projection = self.projected[1]
        self.moments = self.moments_of(self.rows)
        self.spectrum = sm.Spectrum(self.moments)
        self.axis = Figure().add_subplot()
        self.axis.plot([1, 2])

    @staticmethod
    def moments_of(rows):
        moments = empty_moments(rows.shape[1])
        accumulate(moments, Observations(rows))
        return moments

    def entering(self, manager):
        """A function that enters the context returned by another function."""

        @functools.wraps(manager)
        def enter(*args, **kwargs):
            with contextlib.ExitStack() as stack:
                stack.enter_context(manager(*args, **kwargs))

        return enter

    def set_threshold(self, threshold):
        self.projection.threshold = threshold

    def fingerprint(self):
        """Everything that could be changed, in a comparable form."""
        found = {"random": _plain(torch.get_rng_state())}
        for name in ("metric", "folded", "embedding", "pair"):
            metric = getattr(self, name)
            found[name] = _plain(metric.metric_state), metric._update_count, _plain(metric._computed)
        for name in ("model", "convolutions", "unseen", "projected"):
            for path, module in getattr(self, name).named_modules():
                hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
                found[name, path] = hooks, module.training, sorted(vars(module)), type(module)
            found[name] = _plain(getattr(self, name).state_dict())
        for (stage, layer), place in self.probe._places.items():
            state = [_plain(metric.metric_state) for metric in place.members]
            found["probe", stage, layer] = state, place.forwards, place.samples, place.epoch, place.given_up
        found["probe"] = (
            self.probe.layers,
            self.probe._router.paused,
            self.probe._router.masks.value,
            len(self.probe._hooks),
        )
        found["similarity"] = [_plain(each) for each in (self.similarity._sums, self.similarity._counts)]
        found["recorder"] = dict(self.recorder._scalars), self.recorder.next_epoch
        found["projection"] = self.projection.threshold, _plain(self.projection._random)
        found["moments"] = _plain(self.moments.tensors())
        found["axis"] = len(self.axis.get_children()), self.axis.get_xlabel(), len(self.axis.figure.axes)
        for path in self.folder.rglob("*"):
            found[path] = path.read_bytes() if path.is_file() else None
        return found

    def close(self):
        self.recorder._scalars.clear()
        self.recorder.close()

    def _probe(self):
        metrics = [sm.SaturationMetric(), sm.SpectrumMetric(), sm.EffectiveRankMetric()]
        return sm.LayerProbe(self.model, metrics, folds=2)

    def _run_the_model(self):
        for mode in (True, False):
            self.model.train(mode)
            for _ in range(2):
                self.model(torch.randn(40, 4))


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value
