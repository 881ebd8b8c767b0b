import numpy as np
import pytest
import torch

from pipeline.model.config import METADATA_FIELDS, ModelConfig
from pipeline.model.metadata import FIELD_WIDTHS, METADATA_WIDTH, MetadataEncoder, encode_gps
from tests.model.reference import silu

NAN = float("nan")
MARK = 7.0


def encoder(metadata=METADATA_FIELDS, field_dropout=0.0, all_dropout=0.0):
    torch.manual_seed(0)
    config = ModelConfig(
        metadata=metadata,
        text_dim=5,
        metadata_field_dropout=field_dropout,
        metadata_all_dropout=all_dropout,
    )
    module = MetadataEncoder(config)
    for row in module.null_rows.values():
        torch.nn.init.constant_(row, MARK)
    return module


def known_fields(batch):
    generator = torch.Generator().manual_seed(1)
    return {
        "gps": torch.rand(batch, 2, generator=generator) * 100 - 50,
        "weather": torch.randint(0, 2, (batch, 8), generator=generator).float(),
        "daytime": torch.randint(1, 4, (batch,), generator=generator),
        "scene": torch.randint(1, 5, (batch,), generator=generator),
        "text": torch.randn(batch, 5, generator=generator),
    }


def null_fields(batch):
    return {
        "gps": torch.full((batch, 2), NAN),
        "weather": torch.full((batch, 8), NAN),
        "daytime": torch.zeros(batch, dtype=torch.int64),
        "scene": torch.zeros(batch, dtype=torch.int64),
        "text": torch.full((batch, 5), NAN),
    }


def parts_of(encoded):
    return dict(zip(METADATA_FIELDS, encoded.split(list(FIELD_WIDTHS.values()), dim=-1), strict=True))


def is_null(encoded):
    """Per field, which rows are its NULL row: bool [B]."""
    return {name: (part == MARK).all(dim=-1) for name, part in parts_of(encoded).items()}


def sphere_sinusoids(latitude, longitude):
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    point = [
        np.cos(latitude) * np.cos(longitude),
        np.cos(latitude) * np.sin(longitude),
        np.sin(latitude),
    ]
    wavelengths_km = np.geomspace(20_000, 0.1, 18)
    return [
        wave(2 * np.pi * 6371 * coordinate / wavelength)
        for coordinate in point
        for wave in (np.sin, np.cos)
        for wavelength in wavelengths_km
    ]


def test_gps_is_encoded_by_sinusoids_of_the_sphere_point():
    places = [(39.77160604, -86.18823935), (-33.9, 151.2), (0.0, 0.0), (78.2, 15.6)]
    ours = encode_gps(torch.tensor(places, dtype=torch.float64))
    assert ours.shape == (4, 108)
    np.testing.assert_allclose(ours.numpy(), [sphere_sinusoids(*place) for place in places], atol=1e-6)


def test_gps_has_no_seam_at_the_date_line_or_the_poles():
    east, west = encode_gps(torch.tensor([[12.5, 180.0], [12.5, -180.0]]))
    torch.testing.assert_close(east, west, rtol=0, atol=1e-6)
    poles = encode_gps(torch.tensor([[90.0, 0.0], [90.0, 123.0], [-90.0, 45.0], [-90.0, -170.0]]))
    torch.testing.assert_close(poles[0], poles[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(poles[2], poles[3], rtol=0, atol=1e-6)
    assert not torch.allclose(poles[0], poles[2])


def test_gps_tells_places_fifty_metres_apart_and_not_one():
    metre = 1 / 111_195  # degrees of latitude
    here, beside, there = encode_gps(
        torch.tensor([[48.0, 11.0], [48.0 + metre, 11.0], [48.0 + 50 * metre, 11.0]], dtype=torch.float64)
    )
    assert (here - beside).abs().max() < 0.1
    assert (here - there).abs().max() > 1.0


def test_a_field_is_encoded_by_its_own_perceptron():
    module, fields = encoder().eval(), known_fields(3)
    encoded = module(fields, 3, null_metadata=False)
    assert encoded.shape == (3, METADATA_WIDTH) == (3, 704)
    parts = parts_of(encoded)
    one_hot = torch.eye(3)[fields["daytime"] - 1]
    for name, inputs in (("weather", fields["weather"]), ("daytime", one_hot), ("text", fields["text"])):
        first, last = module.encoders[name][0], module.encoders[name][2]
        hidden = silu(inputs @ first.weight.T + first.bias)
        torch.testing.assert_close(parts[name], hidden @ last.weight.T + last.bias)


@pytest.mark.parametrize("training", [True, False])
def test_null_rows_are_the_learned_ones_and_other_rows_are_untouched(training):
    module, known = encoder().train(training), known_fields(4)
    for name, nothing in null_fields(4).items():
        fields = known | {name: torch.cat([known[name][:2], nothing[2:]])}
        encoded = module(fields, 4, null_metadata=False)
        assert is_null(encoded)[name].tolist() == [False, False, True, True]
        assert torch.equal(encoded[:2], module(known, 4, null_metadata=False)[:2])


def test_all_null_gives_the_null_rows_however_it_is_said():
    module = encoder().eval()
    ways = [
        module(null_fields(2), 2, null_metadata=False),
        module(known_fields(2), 2, null_metadata=True),
        module({}, 2, null_metadata=False),
        module(dict.fromkeys(METADATA_FIELDS), 2, null_metadata=False),
    ]
    assert all(torch.equal(way, torch.full((2, 704), MARK)) for way in ways)


def test_half_a_coordinate_is_null():
    fields = {"gps": torch.tensor([[48.0, NAN], [NAN, 11.0], [48.0, 11.0]])}
    nulls = is_null(encoder().eval()(fields, 3, null_metadata=False))["gps"]
    assert nulls.tolist() == [True, True, False]


def test_gradients_are_finite_and_none_comes_from_null_rows():
    module = encoder().train()
    known, nothing = known_fields(3), null_fields(3)
    mixed = {name: torch.cat([known[name], nothing[name]]) for name in known}
    module(mixed, 6, null_metadata=False).pow(2).sum().backward()
    with_null = {name: p.grad.clone() for name, p in module.encoders.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in with_null.values())
    assert all((row.grad == 3 * 2 * MARK).all() for row in module.null_rows.values())
    module.zero_grad()
    module(known, 3, null_metadata=False).pow(2).sum().backward()
    for name, parameter in module.encoders.named_parameters():
        torch.testing.assert_close(parameter.grad, with_null[name])


def test_a_batch_of_nulls_gives_every_encoder_a_gradient_of_zeros():
    module = encoder().train()
    module(null_fields(2), 2, null_metadata=False).sum().backward()
    assert all((p.grad == 0).all() for p in module.encoders.parameters())


def test_dropout_makes_single_fields_and_whole_samples_null_at_their_rates():
    batch = 20_000
    module = encoder(field_dropout=0.1, all_dropout=0.4).train()
    with torch.no_grad():
        nulls = torch.stack(list(is_null(module(known_fields(batch), batch, null_metadata=False)).values()))
    everything = nulls.all(dim=0)
    # five standard errors
    assert everything.float().mean().item() == pytest.approx(0.4 + 0.6 * 0.1**5, abs=0.018)
    rates = nulls[:, ~everything].float().mean(dim=1)
    torch.testing.assert_close(rates, torch.full((5,), 0.1), rtol=0, atol=0.014)
    pairs = (nulls[0] & nulls[1])[~everything].float().mean()
    assert pairs.item() == pytest.approx(0.01, abs=0.005), "fields drop out independently of each other"


def test_by_default_half_of_the_training_samples_have_no_metadata_at_all():
    batch, usual = 20_000, ModelConfig()
    module = encoder(field_dropout=usual.metadata_field_dropout, all_dropout=usual.metadata_all_dropout).train()
    with torch.no_grad():
        nulls = torch.stack(list(is_null(module(known_fields(batch), batch, null_metadata=False)).values()))
    # five standard errors; that all five fields drop out one by one adds 1e-5
    assert nulls.all(dim=0).float().mean().item() == pytest.approx(0.5, abs=0.018)
    torch.testing.assert_close(nulls.float().mean(dim=1), torch.full((5,), 0.55), rtol=0, atol=0.018)


@pytest.mark.parametrize("training", [True, False])
def test_samples_that_must_not_see_metadata_are_null_and_the_others_are_not(training):
    blind = torch.tensor([True, False, True, False])
    for null in is_null(encoder().train(training)(known_fields(4), 4, null_metadata=blind)).values():
        assert torch.equal(null, blind)


def test_nothing_drops_out_in_evaluation():
    module = encoder(field_dropout=0.5, all_dropout=0.5).eval()
    nulls = is_null(module(known_fields(200), 200, null_metadata=False))
    assert not any(null.any() for null in nulls.values())


def test_a_field_that_is_not_enabled_cannot_be_seen():
    module = encoder(metadata=("gps", "scene")).eval()
    nulls = is_null(module(known_fields(4), 4, null_metadata=False))
    assert {name for name, null in nulls.items() if null.all()} == {"weather", "daytime", "text"}
    assert set(module.encoders) == {"gps", "scene"}
