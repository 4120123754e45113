"""Testing: one pass over the test images, with one or several views of each."""

import numpy as np
import pytest
import torch
from networks import CPU, EXACT, Linear, Logits, TinyNetwork, small_network

from session8.augment import normalize
from session8.evaluation import accuracy_by_views, collect_logits
from session8.evaluation import test as run_test
from session8.loaders import make_loader


def views_by_hand(images, views):
    """Return views of images (N, 32, 32, 3): the image, for six views shifts with a reflected border, and mirrors."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    seen = [images, padded[:, 2:, 2:], padded[:, :-2, :-2]] if views == 6 else [images]
    return seen if views == 1 else [*seen, *(view[:, :, ::-1] for view in seen)]


@pytest.mark.parametrize("views", [1, 2, 6])
def test_the_mean_probability_of_the_views_agrees_with_an_independent_computation(synthetic, views, capsys, device):
    split, seen = synthetic[1], views_by_hand(synthetic[1].images, views)
    assert len(seen) == views
    probabilities = np.mean([np.exp(Linear().by_hand(view)) for view in seen], axis=0)
    expected_loss = -np.log(probabilities[range(100), split.labels]).mean()
    of_one = np.exp(Linear().by_hand(split.images))
    assert np.allclose(probabilities, of_one, atol=1e-2) == (views == 1)
    correct = (probabilities.argmax(1) == split.labels).sum()
    for network in (Linear(), Logits()):
        logits = collect_logits(network, split, EXACT, device, views=views)
        assert logits.dtype == torch.float32 and logits.device == CPU
        np.testing.assert_allclose(logits.softmax(1).numpy(), probabilities, atol=2e-5)
        loader = make_loader(split, 32, train=False, device=device)  # the last batch is partial
        loss, accuracy = run_test(network, loader, EXACT, device, views=views)
        assert loss == pytest.approx(expected_loss, rel=1e-4) and accuracy == pytest.approx(correct)
        name = "Test set" if views == 1 else f"Test set, {views} views"
        line = f"{name}: Average loss: {loss:.4f}, Accuracy: {correct}/100 ({accuracy:.2f}%)\n"
        assert capsys.readouterr().out.startswith(line)


def test_dropout_and_batch_norm_behave_as_in_testing(synthetic, device):
    network = TinyNetwork().train()
    logits = collect_logits(network, synthetic[1], EXACT, device)
    with torch.no_grad():
        expected = TinyNetwork().eval()(normalize(torch.from_numpy(synthetic[1].images), CPU))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert not network.training


def test_accuracies_by_views_are_those_of_each_test(synthetic):
    loader = make_loader(synthetic[1], 32, train=False)
    expected = {views: run_test(small_network(), loader, EXACT, CPU, views=views)[1] for views in (2, 6)}
    assert accuracy_by_views(small_network().train(), synthetic[1], EXACT, "cpu") == expected


CALLS = {
    "test": lambda split, views: run_test(Linear(), make_loader(split, 32, train=False), EXACT, CPU, views=views),
    "collect_logits": lambda split, views: collect_logits(Linear(), split, EXACT, "cpu", views=views),
    "accuracy_by_views": lambda split, views: accuracy_by_views(Linear(), split, EXACT, "cpu", (views,)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("views", [0, 3, "6", None])
def test_bad_input_views(synthetic, call, views):
    with pytest.raises(ValueError, match=f"views is {views!r}; expected one of 1, 2, 6"):
        call(synthetic[1], views)
