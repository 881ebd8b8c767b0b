"""Component 8: metadata encoder, every field of which may be NULL."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.devices import upload
from pipeline.model.config import METADATA_FIELDS, ModelConfig
from pipeline.model.mixup import Mix
from pipeline.names import DAYTIME, EARTH_RADIUS_KM, SCENE, WEATHER

FIELD_WIDTHS = {"gps": 256, "weather": 128, "daytime": 64, "scene": 64, "text": 192}
METADATA_WIDTH = sum(FIELD_WIDTHS.values())
# Wavelengths under 100 m are float32 noise, and would let the model memorise places.
LONGEST_KM, SHORTEST_KM, WAVELENGTHS = 20_000.0, 0.1, 18


def encode_gps(gps: torch.Tensor) -> torch.Tensor:
    """Sinusoids of the unit-sphere point at wavelengths from 20,000 km down to 100 m.

    Args:
        gps: [B, 2], latitude and longitude in degrees.

    Returns:
        [B, 3 * 2 * 18], without a seam at the date line or the poles.
    """
    latitude, longitude = gps.double().deg2rad().unbind(-1)
    point = torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], dim=-1)
    exponent = torch.linspace(0, 1, WAVELENGTHS, dtype=torch.float64, device=gps.device)
    wavelength_km = LONGEST_KM * (SHORTEST_KM / LONGEST_KM) ** exponent
    angles = point[..., None] * (2 * math.pi * EARTH_RADIUS_KM / wavelength_km)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2).float()


class MetadataEncoder(nn.Module):
    """Encodes five fields as 704 numbers; a field that is NULL, dropped out or disabled gives its learned NULL row."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.enabled = config.metadata
        self.field_dropout = config.metadata_field_dropout
        self.all_dropout = config.metadata_all_dropout
        inputs = {
            "gps": 3 * 2 * WAVELENGTHS,
            "weather": len(WEATHER),
            "daytime": len(DAYTIME),
            "scene": len(SCENE),
            "text": config.text_dim,
        }
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(inputs[name], width), nn.SiLU(), nn.Linear(width, width))
                for name, width in FIELD_WIDTHS.items()
                if name in self.enabled
            }
        )
        self.null_rows = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(width)) for name, width in FIELD_WIDTHS.items()}
        )

    def forward(
        self,
        fields: dict[str, torch.Tensor | None],
        batch: int,
        null_metadata: bool | torch.Tensor,
        mix: Mix | None = None,
    ) -> torch.Tensor:
        """Encode a batch.

        Args:
            fields: gps [B, 2], weather [B, 8] and text [B, n] with NaN rows for NULL; daytime and scene int64
                [B] with 0 for NULL; a missing field is NULL for all.
            batch: Number of samples B.
            null_metadata: True treats everything as NULL; bool [B] does so for the samples where it is true.
            mix: How the photos are mixed. Fields are mixed before they drop out, so that dropout keeps its rate.

        Returns:
            [B, 704].
        """
        device = next(iter(self.null_rows.values())).device
        if not isinstance(null_metadata, torch.Tensor):
            null_metadata = torch.full((batch,), null_metadata, device=device)
        all_null = upload(null_metadata, device).expand(batch)
        if self.training:
            all_null = all_null | (torch.rand(batch, device=device) < self.all_dropout)
        parts = []
        for name in METADATA_FIELDS:
            null_row = self.null_rows[name].expand(batch, -1)
            value = fields.get(name)
            if name not in self.encoders or value is None:
                parts.append(null_row)
                continue
            inputs, null = _as_inputs(name, value)
            dropped = all_null
            if self.training:
                dropped = dropped | (torch.rand(batch, device=device) < self.field_dropout)
            encoded = torch.where(null[:, None], null_row, self.encoders[name](inputs.to(null_row.dtype)))
            if mix is not None:
                encoded = mix.blend(encoded).to(null_row.dtype)
            parts.append(torch.where(dropped[:, None], null_row, encoded))
        return torch.cat(parts, dim=-1)


def _as_inputs(name: str, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers for a field's encoder, finite everywhere, and which rows are NULL."""
    if name in ("daytime", "scene"):
        words = len(DAYTIME if name == "daytime" else SCENE)
        one_hot = nn.functional.one_hot(value.clamp(min=0), words + 1)[:, 1:].float()
        return one_hot, value <= 0
    null = value.isnan().any(dim=-1)
    finite = torch.where(null[:, None], torch.zeros_like(value), value)
    return (encode_gps(finite) if name == "gps" else finite), null
