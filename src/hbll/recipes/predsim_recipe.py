"""What the networks of Nøkland & Eidnes (arXiv 1901.06656) are trained with."""

from dataclasses import dataclass

from hbll.recipes.base import Recipe, Schedule


@dataclass(frozen=True, kw_only=True)
class PredsimRecipe(Recipe):
    """The paper's tuning, with a cosine in place of its four steps of the learning rate."""

    dropout: float
    """Share of a layer's inputs that is dropped, except of the first one's."""

    batch_size: int = 128
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    learning_rate: float = 5e-4
    """AdamW's, at its highest."""

    schedule: Schedule = "cosine"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    weight_decay: float = 0.0
    """AdamW's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and less than 1, not {self.dropout}")
