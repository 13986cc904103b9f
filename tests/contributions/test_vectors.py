"""Linear layers with one vector per sample are planned and multiplied together."""

from capturing import double, loss_of
from models import Net
from oracle import assert_close, flat, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext


def test_linear_layers_may_change_from_backward_to_backward():
    # Layers with one vector per sample are planned together, and go to the products as they are while all stays.
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()

    def check_twice(batch_size):
        for _ in range(2):
            model.zero_grad()
            x = double(batch_size, 4).to(model[0].weight)
            expected = weak_field(per_sample_gradients(model, loss_of, (x,)))
            loss_of(model(x)).backward()
            assert_close(flat([p.grad for p in model.parameters() if p.requires_grad]), expected.to(x))
            assert [layer.name for layer in handle.plan().layers] == ["0", "2", "4", "5"]

    with rgd_ext.precondition(model) as handle:
        check_twice(5)
        check_twice(3)
        for frozen in (model[2].bias, model[2].weight):
            frozen.requires_grad_(False)
            check_twice(3)
            frozen.requires_grad_(True)
        check_twice(3)
        held = handle.plan().bytes
        check_twice(6)
        assert handle.plan().bytes == 2 * held
        model.float()
        check_twice(6)
        model.double()
        model[1] = model[0]  # called twice from now on
        check_twice(5)


def test_the_weight_of_a_linear_layer_may_have_a_second_use_in_some_backwards():
    def forward(m, x):
        once = m.layer(x)
        return once + m.layer(once[:, None].expand(-1, 3, -1).tanh()).sum(1) if m.twice else once

    model = Net(forward, layer=nn.Linear(4, 4), twice=False).double()
    with rgd_ext.precondition(model):
        for model.twice in (False, False, True, True, False):
            model.zero_grad()
            x = double(5, 4)
            loss_of(model(x)).backward()
            assert_close(flat_grad(model), weak_field(per_sample_gradients(model, loss_of, (x,))))
