"""The gallery: its command, and the numbers behind its pictures."""

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from oracle import direction, per_sample_gradients
from torch.nn.functional import cross_entropy

from rgd_ext import geometry
from rgd_ext.__main__ import main
from rgd_ext.commands.demo.data import TRAIN_SIZE, load
from rgd_ext.commands.gallery import sample_weights, spectra, training, trajectories, weak_field

NAMES = ("trajectories", "spectrum", "weak_field", "sample_weights")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def noisy():
    return load(0.3, seed=0)


def nothing():
    pass


def test_command_writes_four_pictures_and_prints_their_paths(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert main(["gallery", str(folder), "--quick"]) == 0
    captured = capsys.readouterr()
    paths = [folder / f"{name}.png" for name in NAMES]
    assert captured.out.splitlines() == [str(path) for path in paths]
    assert captured.err == ""
    assert sorted(folder.iterdir()) == sorted(paths)
    for path in paths:
        assert imread(path)[..., :3].std() > 0.05


@pytest.mark.parametrize("path", ["file", "file/folder"])
def test_a_file_in_the_way_is_refused(path, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as error:
        main(["gallery", str(tmp_path / path)])
    assert error.value.code == 2
    assert "cannot be written: pass a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_is_not_writable_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SystemExit):
        main(["gallery", str(tmp_path / "new")])
    assert "cannot be written" in capsys.readouterr().err


def test_folder_that_cannot_be_made_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: True)
    assert main(["gallery", "/proc/no/folder"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# Trajectories


def test_steps_of_rgd_follow_an_explicit_direction():
    losses = trajectories.neuron()
    x = torch.tensor(trajectories.STARTS[0], dtype=torch.float64)
    positions = trajectories.rgd_steps(losses, x)
    assert positions.shape == (trajectories.STEPS + 1, 2)
    for position in positions[:5]:
        torch.testing.assert_close(position, x)
        expected = direction(torch.func.jacrev(losses)(x), "Spectral", trajectories.FRACTION)
        x = x - trajectories.LEARNING_RATE * expected


def test_paths_start_together_differ_and_descend():
    losses, done = trajectories.neuron(), []
    results = trajectories.measure(losses, lambda: done.append(1))
    assert len(results) == len(done) == len(trajectories.STARTS)
    for start, paths in zip(trajectories.STARTS, results, strict=True):
        assert list(paths) == list(trajectories.STYLES)
        for name, positions in paths.items():
            count = trajectories.SGD_PATHS if name == "SGD" else 1
            assert positions.shape == (count, trajectories.STEPS + 1, 2)
            assert positions[:, 0].tolist() == [list(start)] * count
            assert all(losses(end).mean() < losses(positions[0, 0]).mean() - 0.2 for end in positions[:, -1])
        gradient, flow, steps = (paths[name][0] for name in ("gradient flow", "RGD flow", "RGD steps"))
        assert (flow - steps).norm(dim=1).max() < 0.1 < (flow - gradient).norm(dim=1).max()


def test_diffusion_matrix_of_the_neuron_varies():
    losses = trajectories.neuron()
    matrices = [geometry.diffusion_matrix(losses, torch.tensor(x, dtype=torch.float64)) for x in trajectories.POINTS]
    traces = torch.stack([matrix.trace() for matrix in matrices])
    assert traces.max() > 3 * traces.min()


# Spectra


def test_spectra_are_those_of_all_training_samples():
    digits, epochs = load(0, seed=0), []
    found = spectra.measure(digits, 1, lambda: epochs.append(1))
    assert list(found) == [0, 5, 10, 15, 20]
    assert len(epochs) == 1
    images, labels = digits.train_images.double(), digits.train_labels
    grads = per_sample_gradients(training.initial_model(), lambda output: cross_entropy(output, labels), [images])
    centred = grads - grads.mean(0)
    expected = torch.linalg.eigvalsh(centred @ centred.T / TRAIN_SIZE).flip(0)[:-1]
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-12)
    assert found[20].sum() > found[0].sum()


@pytest.mark.parametrize(("eigenvalues", "rank"), [([2.0, 0, 0], 1), ([3.0, 3, 3, 0], 3), ([2.0, 1], 9 / 5)])
def test_effective_rank_counts_equal_eigenvalues(eigenvalues, rank):
    assert spectra.effective_rank(torch.tensor(eigenvalues)) == pytest.approx(rank)


def test_curves_stay_below_the_upper_frame(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    # Curves that are almost flat, and far from zero.
    spectra.draw({step: torch.tensor([2.0, 1.0 - 1e-3 * step]) for step in (0, 20, 40)}, tmp_path / "x.png")
    panels = [axes for axes in figures[0].get_axes() if axes.get_ylim()[0] == 0 and axes.lines]
    assert len(panels) == 3
    for axes in panels:
        assert axes.lines[0].get_ydata().max() < 0.97 * axes.get_ylim()[1]


# Weak field


def test_errors_are_those_of_explicit_matrices_and_of_second_order(noisy, monkeypatch):
    monkeypatch.setattr(weak_field, "SAMPLES", 6)
    losses = trajectories.neuron()
    errors = weak_field.measure(losses, noisy)
    torch.testing.assert_close(errors.operator, weak_field.FRACTIONS**2 / (1 + weak_field.FRACTIONS))
    labels = noisy.train_labels[:6]
    inputs = [noisy.train_images[:6]]
    grads = per_sample_gradients(training.initial_model(), lambda output: cross_entropy(output, labels), inputs)
    # In the basis of the samples, where D is small.
    basis = torch.linalg.qr(grads.T).Q
    grads = grads @ basis
    for index in (0, 20, -1):
        fraction = weak_field.FRACTIONS[index].item()
        difference = direction(grads, fraction=fraction, inverse="exact") - direction(grads, fraction=fraction)
        expected = difference.norm() / grads.mean(0).norm()
        torch.testing.assert_close(errors.direction[index], expected, rtol=1e-6, atol=0)
    assert [weak_field.slope(values) for values in errors] == pytest.approx([2, 2], abs=0.02)
    assert weak_field.at_limit(errors.operator) == pytest.approx(0.5)


# Weights of samples


def test_shares_count_mislabelled_samples_at_both_ends():
    weights = torch.tensor([5.0, *range(100, 119), 900.0, *range(200, 219)], dtype=torch.float64)
    mislabelled = torch.zeros(40, dtype=torch.bool)
    mislabelled[[0, 1, 20, 30]] = True
    assert sample_weights.shares(weights, mislabelled) == (1, 0.5, 0.1)
    assert sample_weights.shares(-weights, mislabelled) == (0.5, 1, 0.1)


def test_weights_are_those_of_explicit_gradients(noisy):
    model = training.initial_model()
    steps = training.train(model, noisy, 1, nothing)
    batch, stats = next(steps)
    labels, inputs = noisy.train_labels[batch], [noisy.train_images[batch]]
    grads = per_sample_gradients(training.initial_model(), lambda output: cross_entropy(output, labels), inputs)
    centred = grads - grads.mean(0)
    epsilon = 0.5 / torch.linalg.eigvalsh(centred @ centred.T / 64)[-1]
    torch.testing.assert_close(64 * stats.weights, 1 - epsilon * centred @ grads.mean(0))


def test_weights_are_averaged_over_the_last_epochs(noisy, monkeypatch):
    def train(model, digits, epochs, after_epoch):
        class Stats:
            batch_size = 64

        order = torch.arange(TRAIN_SIZE)
        for epoch in range(epochs):
            for batch in (order + epoch).remainder(TRAIN_SIZE).split(64):
                Stats.weights = (batch.double() + 2000 * epoch) / 64
                yield batch, Stats

    monkeypatch.setattr(sample_weights, "train", train)
    for epochs, averaged, mean in ((7, 5, 4), (2, 2, 0.5)):
        weights = sample_weights.measure(noisy, epochs, nothing)
        assert weights.epochs == averaged
        expected = torch.arange(TRAIN_SIZE) + 2000 * mean
        torch.testing.assert_close(weights.in_batches, expected.double(), rtol=1e-6, atol=0)


def test_weights_in_a_batch_of_all_samples_sum_to_their_number(noisy):
    weights = sample_weights.measure(noisy, 1, nothing)
    assert weights.in_all.sum().item() == pytest.approx(TRAIN_SIZE)
    assert weights.in_batches.sum().item() == pytest.approx(TRAIN_SIZE)


def test_histogram_counts_every_sample(monkeypatch):
    counted, hist = [], Axes.hist
    monkeypatch.setattr(Axes, "hist", lambda *args, **options: counted.append(hist(*args, **options)[0]))
    # In float32 the ends are inside.
    weights = torch.tensor([0.1, 0.9, 1.0, 1.1, 1.3], dtype=torch.float64)
    assert weights[0].item() < weights[0].float().item()
    assert weights[-1].item() > weights[-1].float().item()
    sample_weights._draw_histogram(Figure().subplots(), weights, torch.tensor([True, False, False, True, False]))
    assert [counts.sum() for counts in counted] == [3, 2]


def test_title_says_what_came_out():
    mislabelled = torch.zeros(100, dtype=torch.bool)
    mislabelled[:30] = True
    ascending = torch.arange(100.0)
    weights = sample_weights.Weights(in_batches=ascending, epochs=3, in_all=-ascending)
    title = sample_weights._title(weights, mislabelled)
    assert "100 % of the 5 % of the samples with the least weight, 0 % of the 5 % with the most, 30 % of all" in title
    assert "last 3 epochs; in one batch of all samples it is 0 % and 100 %" in title


def test_training_is_the_same_every_time(noisy):
    first, second = (sample_weights.measure(noisy, 1, nothing) for _ in range(2))
    assert torch.equal(first.in_batches, second.in_batches)
    assert torch.equal(first.in_all, second.in_all)
