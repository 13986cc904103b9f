"""What the tests of the capture have in common."""

from oracle import flat_grad

import rgd_ext


def loss_of(output):
    return output.sin().square().mean()


def captured_grad(model, *inputs, loss=loss_of, **options):
    with rgd_ext.precondition(model, **options):
        loss(model(*inputs)).backward()
    return flat_grad(model)
