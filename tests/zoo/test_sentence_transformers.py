"""sentence-transformers' trainers with the mixin: losses that look at the whole batch, that run backward passes of their own,
that have parameters which only the optimizer knows, several data sets."""

# ruff: noqa: E402 (what is imported may not be there)

from __future__ import annotations

import pytest
import torch
from zoo import kit, words

sentence_transformers = pytest.importorskip("sentence_transformers")
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder import losses as pair_losses
from sentence_transformers.multi_vector_encoder import losses as token_losses
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import LSTM, Dropout, Pooling, StaticEmbedding, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sentence_transformers.sparse_encoder import losses as sparse_losses
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseAutoEncoder, SpladePooling
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, set_seed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the library's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


# --- models ----------------------------------------------------------------------------------------------------------


def saved(folder, cls=BertModel, **options) -> str:
    """A folder with a small BERT and its tokenizer."""
    set_seed(0)
    config = BertConfig(
        vocab_size=len(words.VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        **options,
    )
    path = str(folder / f"{cls.__name__}{options.get('num_labels', '')}")
    cls(config).save_pretrained(path)
    words.tokenizer().save_pretrained(path)
    return path


def bert(folder) -> SentenceTransformer:
    body = Transformer(saved(folder))
    set_seed(1)
    modules = [body, Pooling(body.get_embedding_dimension()), Dropout(0.1), Dense(16, 12)]
    return SentenceTransformer(modules=modules, device="cpu")


def with_adapter(folder) -> SentenceTransformer:
    model = bert(folder)
    options = LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.1, init_lora_weights=False)
    model[0].model = get_peft_model(model[0].model, options)
    return model


def lstm(folder) -> SentenceTransformer:
    set_seed(1)
    embeddings = WordEmbeddings(
        WhitespaceTokenizer(words.VOCABULARY), torch.randn(len(words.VOCABULARY), 8).numpy(), update_embeddings=True
    )
    return SentenceTransformer(modules=[embeddings, LSTM(8, 8, dropout=0.1, num_layers=2), Pooling(16)], device="cpu")


def bag_of_words(folder) -> SentenceTransformer:
    set_seed(1)
    return SentenceTransformer(
        modules=[StaticEmbedding(words.tokenizer().backend_tokenizer, embedding_dim=16)], device="cpu"
    )


# --- data ------------------------------------------------------------------------------------------------------------


def pairs(first: int = 0, count: int = 16) -> Dataset:
    rows = range(first, first + count)
    return Dataset.from_list(
        [{"anchor": words.sentence(i, 3 + i % 4), "positive": words.sentence(i + 100, 3 + i % 3)} for i in rows]
    )


def triplets() -> Dataset:
    return pairs().map(lambda row, i: {"negative": words.sentence(i + 200, 4)}, with_indices=True)


def labelled(kind: str = "class"):
    def data() -> Dataset:
        label = {"class": lambda i: i % 3, "score": lambda i: (i % 5) / 4, "binary": lambda i: i % 2}[kind]
        return pairs().map(lambda row, i: {"label": label(i)}, with_indices=True)

    return data


def single() -> Dataset:
    return Dataset.from_list([{"sentence": words.sentence(i, 4), "label": i % 3} for i in range(16)])


def taught() -> Dataset:
    return Dataset.from_list(
        [{"sentence": words.sentence(i, 4), "label": [float((i + k) % 5) for k in range(12)]} for i in range(16)]
    )


def taught_triplets() -> Dataset:
    return triplets().map(lambda row, i: {"label": float(i % 5) / 5}, with_indices=True)


def several() -> DatasetDict:
    return DatasetDict({"pairs": pairs(), "classes": labelled()(), "scores": labelled("score")()})


def rankings() -> Dataset:
    return Dataset.from_list(
        [
            {
                "query": words.sentence(i, 3),
                "docs": [words.sentence(i + 10 * k, 4) for k in range(3)],
                "labels": [float(k == i % 3) for k in range(3)],
            }
            for i in range(16)
        ]
    )


# --- sentence encoders -----------------------------------------------------------------------------------------------


def softmax(model):
    return losses.SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=3)


class Components(torch.nn.Module):
    """A loss of several parts, which the trainer logs one by one."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.ranking = losses.MultipleNegativesRankingLoss(model)
        self.spread = losses.GlobalOrthogonalRegularizationLoss(model)

    def forward(self, features, labels=None):
        embeddings = [self.model(feature)["sentence_embedding"] for feature in features]
        parts = {"ranking": self.ranking.compute_loss_from_embeddings(embeddings, labels)}
        return {**parts, **self.spread.compute_loss_from_embeddings(embeddings, labels)}


def ranking(model):
    return losses.MultipleNegativesRankingLoss(model)


# By name: model, data, loss, training arguments.
ENCODERS = {
    "in-batch negatives": (bert, pairs, ranking, {}),
    "hard negatives": (bert, triplets, ranking, {}),
    "symmetric": (bert, pairs, losses.MultipleNegativesSymmetricRankingLoss, {}),
    "cached": (bert, pairs, lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), {}),
    "cached, symmetric": (
        bert,
        pairs,
        lambda model: losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=2),
        {},
    ),
    "guided": (bert, pairs, "guided", {}),
    "guided, cached": (bert, pairs, "guided, cached", {}),
    "softmax": (bert, labelled(), softmax, {}),
    "softmax, its own learning rate": (
        bert,
        labelled(),
        softmax,
        {"learning_rate_mapping": {"classifier": 1e-1}, "weight_decay": 0.1},
    ),
    "softmax, clipped": (bert, labelled(), softmax, {"max_grad_norm": 0.01}),
    "components": (bert, pairs, Components, {}),
    "dimensions": (
        bert,
        pairs,
        lambda model: losses.MatryoshkaLoss(model, ranking(model), [12, 8, 4], n_dims_per_step=2),
        {},
    ),
    "dimensions, cached": (
        bert,
        pairs,
        lambda model: losses.MatryoshkaLoss(
            model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), [12, 8, 4]
        ),
        {},
    ),
    "layers": (bert, pairs, lambda model: losses.AdaptiveLayerLoss(model, ranking(model)), {}),
    "layers and dimensions": (
        bert,
        pairs,
        lambda model: losses.Matryoshka2dLoss(model, ranking(model), [12, 6]),
        {},
    ),
    "tension": (bert, labelled("binary"), losses.ContrastiveTensionLoss, {}),
    "tension in the batch": (bert, pairs, losses.ContrastiveTensionLossInBatchNegatives, {}),
    "contrastive": (bert, labelled("binary"), losses.ContrastiveLoss, {}),
    "contrastive, hard pairs": (bert, labelled("binary"), losses.OnlineContrastiveLoss, {}),
    "cosine": (bert, labelled("score"), losses.CosineSimilarityLoss, {}),
    "CoSENT": (bert, labelled("score"), losses.CoSENTLoss, {}),
    "AnglE": (bert, labelled("score"), losses.AnglELoss, {}),
    "triplets": (bert, triplets, losses.TripletLoss, {}),
    "all triplets of a batch": (bert, single, losses.BatchAllTripletLoss, {}),
    "hard triplets of a batch": (bert, single, losses.BatchHardTripletLoss, {}),
    "mega-batch": (bert, pairs, lambda model: losses.MegaBatchMarginLoss(model, mini_batch_size=2), {}),
    "distilled": (bert, taught, losses.MSELoss, {}),
    "distilled margins": (bert, taught_triplets, losses.MarginMSELoss, {}),
    "no duplicates": (bert, pairs, ranking, {"batch_sampler": "no_duplicates"}),
    "prompts": (bert, pairs, ranking, {"prompts": {"anchor": "ba be ", "positive": "da "}}),
    "several data sets, one loss": (bert, lambda: DatasetDict({"a": pairs(), "b": pairs(50)}), ranking, {}),
    "several data sets and losses": (bert, several, "several", {}),
    "several data sets in turn": (bert, several, "several", {"multi_dataset_batch_sampler": "round_robin"}),
    "LoRA": (with_adapter, pairs, ranking, {}),
    "LoRA, softmax": (with_adapter, labelled(), softmax, {}),
    "recomputed": (bert, pairs, ranking, {"activation_checkpointing": True}),
    "recomputed, cached": (
        bert,
        pairs,
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
        {"activation_checkpointing": True},
    ),
    "LSTM": (lstm, pairs, ranking, {}),
    "static embeddings": (bag_of_words, pairs, ranking, {}),
}


def sentence_builder(name, tmp_path, **overrides):
    make, data, loss, options = ENCODERS[name]

    def build(cls, **sam):
        model = make(tmp_path)
        set_seed(4)
        if loss == "several":
            made = {
                "pairs": losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
                "classes": softmax(model),
                "scores": losses.CosineSimilarityLoss(model),
            }
        elif loss == "guided":
            made = losses.GISTEmbedLoss(model, bert(tmp_path))
        elif loss == "guided, cached":
            made = losses.CachedGISTEmbedLoss(model, bert(tmp_path), mini_batch_size=2)
        else:
            made = loss(model)
        examples = data()
        if isinstance(examples, DatasetDict):
            held_out = DatasetDict({key: part.select(range(4)) for key, part in examples.items()})
        else:
            held_out = examples.select(range(4))
        settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, **options, **overrides}
        return cls(
            model=model,
            args=kit.arguments(tmp_path, SentenceTransformerTrainingArguments, **settings),
            train_dataset=examples,
            eval_dataset=held_out,
            loss=made,
            **sam,
        )

    return build


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_a_sentence_encoder(name, micro_batches, tmp_path):
    build = sentence_builder(name, tmp_path, gradient_accumulation_steps=micro_batches)
    kit.assert_same_as_stock(build, SentenceTransformerTrainer)


def test_parts_of_the_loss_are_those_of_the_clean_pass(tmp_path):
    build = sentence_builder("components", tmp_path, max_steps=1, eval_strategy="no", gradient_accumulation_steps=2)
    kit.assert_first_entry_is_the_stock_trainers(build, SentenceTransformerTrainer, but={"grad_norm"})


# --- pairs at once ---------------------------------------------------------------------------------------------------


PAIRS = {
    "binary": (1, labelled("binary"), pair_losses.BinaryCrossEntropyLoss),
    "classes": (3, labelled(), pair_losses.CrossEntropyLoss),
    "in-batch negatives": (1, pairs, lambda model: pair_losses.MultipleNegativesRankingLoss(model, num_negatives=2)),
    "in-batch negatives, cached": (
        1,
        pairs,
        lambda model: pair_losses.CachedMultipleNegativesRankingLoss(model, num_negatives=2, mini_batch_size=2),
    ),
    "LambdaRank": (1, rankings, pair_losses.LambdaLoss),
    "ListNet": (1, rankings, pair_losses.ListNetLoss),
    "ListMLE": (1, rankings, pair_losses.ListMLELoss),
    "RankNet": (1, rankings, pair_losses.RankNetLoss),
    "distilled margins": (1, taught_triplets, pair_losses.MarginMSELoss),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_a_cross_encoder(name, tmp_path):
    classes, data, loss = PAIRS[name]

    def build(cls, **sam):
        path = saved(tmp_path, BertForSequenceClassification, num_labels=classes)
        model = CrossEncoder(path, num_labels=classes, device="cpu")
        set_seed(4)
        return cls(
            model=model,
            args=kit.arguments(
                tmp_path, CrossEncoderTrainingArguments, per_device_train_batch_size=4, learning_rate=1e-3
            ),
            train_dataset=data(),
            eval_dataset=data().select(range(4)),
            loss=loss(model),
            **sam,
        )

    kit.assert_same_as_stock(build, CrossEncoderTrainer)


# --- sparse encoders -------------------------------------------------------------------------------------------------


def splade(folder) -> SparseEncoder:
    return SparseEncoder(modules=[MLMTransformer(saved(folder, BertForMaskedLM)), SpladePooling()], device="cpu")


def auto_encoder(folder) -> SparseEncoder:
    body = Transformer(saved(folder))
    set_seed(1)
    return SparseEncoder(
        modules=[body, Pooling(16), SparseAutoEncoder(input_dim=16, hidden_dim=32, k=4, k_aux=8, dead_threshold=1)],
        device="cpu",
    )


SPARSE = {
    "SPLADE": (
        splade,
        lambda model: sparse_losses.SpladeLoss(
            model,
            sparse_losses.SparseMultipleNegativesRankingLoss(model),
            document_regularizer_weight=3e-3,
            query_regularizer_weight=5e-3,
        ),
    ),
    "SPLADE, cached": (
        splade,
        lambda model: sparse_losses.CachedSpladeLoss(
            model,
            sparse_losses.SparseMultipleNegativesRankingLoss(model),
            document_regularizer_weight=3e-3,
            query_regularizer_weight=5e-3,
            mini_batch_size=2,
        ),
    ),
    "auto-encoder that counts dead units": (auto_encoder, sparse_losses.CSRLoss),
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", list(SPARSE))
def test_a_sparse_encoder(name, micro_batches, tmp_path):
    make, loss = SPARSE[name]

    def build(cls, **sam):
        model = make(tmp_path)
        set_seed(4)
        made = loss(model)
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": micro_batches}
        return cls(
            model=model,
            args=kit.arguments(tmp_path, SparseEncoderTrainingArguments, learning_rate=1e-3, **settings),
            train_dataset=pairs(),
            eval_dataset=pairs().select(range(4)),
            loss=made,
            callbacks=[SpladeRegularizerWeightSchedulerCallback(loss=made)] if "SPLADE" in name else None,
            **sam,
        )

    kit.assert_same_as_stock(build, SparseEncoderTrainer)


# --- a vector for each token -----------------------------------------------------------------------------------------

TOKENS = {
    "in-batch negatives": (triplets, token_losses.MultiVectorMultipleNegativesRankingLoss),
    "in-batch negatives, in small parts": (
        triplets,
        lambda model: token_losses.MultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ),
    "in-batch negatives, cached": (
        triplets,
        lambda model: token_losses.CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ),
    "distilled margins": (taught_triplets, token_losses.MultiVectorMarginMSELoss),
}


@pytest.mark.parametrize("name", list(TOKENS))
def test_a_multi_vector_encoder(name, tmp_path):
    data, loss = TOKENS[name]

    def build(cls, **sam):
        body = Transformer(saved(tmp_path))
        set_seed(1)
        project = Dense(
            16, 8, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"
        )
        normalize = Normalize(module_input_name="token_embeddings")
        model = MultiVectorEncoder(modules=[body, project, MultiVectorMask(), normalize], device="cpu")
        set_seed(4)
        return cls(
            model=model,
            args=kit.arguments(
                tmp_path, MultiVectorEncoderTrainingArguments, per_device_train_batch_size=4, learning_rate=1e-3
            ),
            train_dataset=data(),
            eval_dataset=data().select(range(4)),
            loss=loss(model),
            **sam,
        )

    kit.assert_same_as_stock(build, MultiVectorEncoderTrainer)
