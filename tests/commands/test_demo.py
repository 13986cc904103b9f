"""The demo: its data, its trainings and its command."""

import subprocess
import sys

import pytest
import torch

from rgd_ext.commands.demo import optimizers
from rgd_ext.commands.demo.data import TRAIN_SIZE, load, shuffled_batches
from rgd_ext.commands.demo.models import MODELS
from rgd_ext.commands.demo.training import train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_label_noise_replaces_exactly_its_fraction_of_the_training_labels():
    clean, noisy = load(0.0, seed=0), load(0.3, seed=0)
    differ = clean.train_labels != noisy.train_labels
    assert differ.sum() == 0.3 * TRAIN_SIZE
    assert torch.equal(differ, noisy.mislabelled)
    assert noisy.train_labels.unique().tolist() == list(range(10))
    assert not clean.mislabelled.any()


def test_label_noise_leaves_images_and_test_labels_alone():
    clean, noisy = load(0.0, seed=0), load(0.3, seed=1)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(clean.test_images, noisy.test_images)
    assert torch.equal(clean.train_images, noisy.train_images)


def test_label_noise_is_a_function_of_the_seed():
    labels = load(0.3, seed=1).train_labels
    assert torch.equal(load(0.3, seed=1).train_labels, labels)
    assert not torch.equal(load(0.3, seed=2).train_labels, labels)


@pytest.mark.parametrize("seed", range(3))
def test_wrong_labels_are_spread_over_the_batches(seed):
    mislabelled = load(0.3, seed).mislabelled
    shares = [mislabelled[batch].float().mean() for batch in next(shuffled_batches(1, seed))]
    # Of 64 samples, of which each is mislabelled with a probability of 0.3: four standard deviations.
    assert all(abs(share - 0.3) < 0.23 for share in shares)


def test_split_keeps_all_digits_and_the_classes_in_proportion():
    digits = load(0.0, seed=0)
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    train_share = digits.train_labels.bincount() / TRAIN_SIZE
    test_share = digits.test_labels.bincount() / len(digits.test_labels)
    torch.testing.assert_close(train_share, test_share, atol=0.005, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_optimizers_start_from_the_same_weights_on_the_same_batches(model):
    first, second = (train(MODELS[model], load(0.3, seed=0), 0.01, 1, 0, lambda: None) for _ in range(2))
    assert list(first) == list(optimizers.NAMES)
    assert len({history.losses[0] for history in first.values()}) == 1
    assert all(history.mislabelled == first["SGD"].mislabelled for history in first.values())
    assert [history.losses for history in first.values()] == [history.losses for history in second.values()]


def test_history_of_rgd_holds_its_epsilons_and_weights_that_sum_to_the_batch_size():
    histories = train(MODELS["MLP"], load(0.0, seed=0), 0.01, 1, 0, lambda: None)
    assert not histories["SGD"].epsilons
    for name in optimizers.NAMES[1:]:
        history = histories[name]
        assert len(history.epsilons) == len(history.losses) == len(history.seconds) == 20
        sums = torch.tensor(history.weights).sum(1)
        torch.testing.assert_close(sums, torch.full_like(sums, 64.0), atol=1e-3, rtol=0)
    spectral = histories["RGD Spectral(0.5)"]
    products = torch.tensor(spectral.epsilons) * torch.tensor(spectral.largest_eigenvalues)
    torch.testing.assert_close(products, torch.full_like(products, 0.5))


def test_quick_demo_prints_the_table_and_ends_with_the_path_of_the_figure(tmp_path):
    path = tmp_path / ("long" * 30) / "x.png"
    path.parent.mkdir()
    command = [sys.executable, "-m", "rgd_ext", "demo", "--quick", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(path.resolve())
    assert path.read_bytes().startswith(b"\x89PNG")
    for name in optimizers.NAMES:
        assert sum(line.startswith(f"    {name} ") for line in done.stdout.splitlines()) == 4
    assert "1 seed, 2 epochs, batch size 64" in done.stdout
    assert len(done.stderr.splitlines()) == 4
