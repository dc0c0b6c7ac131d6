"""A rank that trains the mixers alone: `brumby.train` with all other parameters frozen."""

from brumby.train import __main__ as main
from brumby.train import engine

load_model = engine.load_model


def load_frozen(*args, **kwargs):
    model = load_model(*args, **kwargs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".self_attn." in name)
    return model


if __name__ == "__main__":
    engine.load_model = load_frozen
    main.main()
