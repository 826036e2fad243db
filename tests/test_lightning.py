"""Lightning's trainer on a model with a lazy head, beside the same with a dense head."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import logitless as ll

CLASSES = 61

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning_fabric.utilities.warnings import PossibleUserWarning
    from pytorch_lightning import LightningModule, Trainer, seed_everything


class Model(LightningModule):
    """An embedding and a head, with the loss and the metrics that people write."""

    def __init__(self, lazy: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Embedding(CLASSES, 8)
        self.head = nn.Linear(8, CLASSES)
        if lazy:
            ll.lazy_head(self)
        self.seen: list[tuple[float, float]] = []

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(ids))
        return logits

    def training_step(self, batch: Any, number: int) -> Tensor:
        (ids,) = batch
        logits = self(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
        right = (logits.argmax(-1) == ids[:, 1:]).float().mean()
        self.log("train_loss", loss)
        self.seen.append((float(loss.detach()), float(right)))
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        (ids,) = batch
        logits = self(ids[:, :-1])
        nll = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        self.seen.append((float(nll.mean()), float(logits.logsumexp(-1).mean())))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fitted(lazy: bool, folder: str, **options: Any) -> Model:
    seed_everything(1, verbose=False)
    ids = torch.randint(CLASSES, (12, 9), generator=torch.Generator().manual_seed(3))
    model = Model(lazy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # about workers of the loader
        warnings.filterwarnings("ignore", message=".*litmodels.*|.*isinstance\\(treespec, LeafSpec\\).*")
        trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        loaders = [DataLoader(TensorDataset(ids), batch_size=4) for _ in range(2)]
        trainer.fit(model, *loaders)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_the_same_steps(options: dict[str, Any], tmp_path: Any) -> None:
    dense, lazy = (fitted(lazily, str(tmp_path / str(lazily)), **options) for lazily in (False, True))
    # bfloat16 logits are rounded where they are dense.
    tolerance = 2e-2 if options.get("precision") == "bf16-mixed" else 2e-5
    torch.testing.assert_close(torch.tensor(lazy.seen), torch.tensor(dense.seen), rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(lazy.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_a_checkpoint_of_a_lazy_head_is_that_of_a_dense_one(tmp_path: Any) -> None:
    model = fitted(True, str(tmp_path), enable_checkpointing=True)
    (saved,) = tmp_path.rglob("*.ckpt")
    state = torch.load(saved, weights_only=False)["state_dict"]
    assert state.keys() == Model(False).state_dict().keys()
    other = Model(False)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
