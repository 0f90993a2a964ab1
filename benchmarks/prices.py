"""What an hour of audio costs on a GPU, by others' prices and speeds: each says whose and when."""

from dataclasses import dataclass

from jobs.settings import GPU_PRICES, Settings

CPU_PRICE: float = Settings.model_fields["cpu_second_price"].default

ONE = "faster-whisper, one window at a time"
EIGHT = "faster-whisper, 8 windows at a time"
OPENAI = "openai-whisper"
TRANSFORMERS = "transformers, 96 windows at a time"

# From a card whose speed was published to one whose was not: what a decoder mostly waits for is
# its weights, so by the bandwidth of the memory. It says 42 for the RTX 3070 Ti, which has 46.
REFERENCE = ("RTX 3090", 65.2, 936)  # audio-seconds a second, GB/s
BANDWIDTHS = {
    "T4": 320,
    "L4": 300,
    "A10": 600,
    "L40S": 864,
    "A100-40GB": 1555,
    "A100-80GB": 2039,
    "H100": 3350,
    "H200": 4800,
}


@dataclass(frozen=True, slots=True)
class Speed:
    """Audio-seconds a second of Whisper's large model on a GPU, and who says so."""

    gpu: str
    engine: str
    speed: float
    source: str
    own_price: float | None = None

    @property
    def price(self) -> float | None:
        """Dollars for a second of the GPU alone: Modal's, unless there is another."""
        return GPU_PRICES.get(self.gpu) if self.own_price is None else self.own_price

    def cost(self, busy: float = 1.0) -> float | None:
        """Return the dollars for an hour of audio, from containers that are busy so much."""
        price = self.price
        return None if price is None else 3600 / self.speed * (price + CPU_PRICE) / busy


PUBLISHED = (
    Speed("T4", ONE, 15.6, "whisper-jax#186, 2024-03"),
    Speed("A10", OPENAI, 4.5, "Phonexia, read 2026-11"),
    Speed("A100-80GB", TRANSFORMERS, 183.7, "insanely-fast-whisper#44, 2023-11"),
)
# Modal has no such GPUs, so they have no price.
ELSEWHERE = (
    Speed("RTX 3070 Ti", OPENAI, 5.5, "faster-whisper 1.1.0, 2024-11"),
    Speed("RTX 3070 Ti", ONE, 12.4, "faster-whisper 1.1.0, 2024-11"),
    Speed("RTX 3070 Ti", EIGHT, 45.9, "faster-whisper 1.1.0, 2024-11"),
    Speed("RTX 3090", ONE, 21.2, "speaches#169, 2024-12"),
    Speed("RTX 3090", EIGHT, 65.2, "speaches#169, 2024-12"),
)


def speeds() -> list[Speed]:
    """Return what was published, and what is computed for each of Modal's GPUs."""
    _, reference, bandwidth = REFERENCE
    computed = [
        Speed(gpu, EIGHT, reference * theirs / bandwidth, "computed by bandwidth")
        for gpu, theirs in BANDWIDTHS.items()
    ]
    order = list(BANDWIDTHS)
    by_gpu = sorted([*PUBLISHED, *computed], key=lambda speed: order.index(speed.gpu))
    return [*ELSEWHERE, *by_gpu]
