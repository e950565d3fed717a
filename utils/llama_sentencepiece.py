"""LLaMA-format `tokenizer.model` files: SentencePiece's own ids here, and the same ids from a `tokenizer.json`.

transformers' own LLaMA class ignores the pieces' scores, so that runs of spaces and code come out as other ids than
the published weights were trained on; here SentencePiece itself encodes.
"""

from itertools import groupby
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

_BPE = 2  # sentencepiece_model.proto, TrainerSpec.ModelType
_NORMAL, _USER_DEFINED = 1, 4  # ModelProto.SentencePiece.Type


class SentencePieceTokenizer(SentencePieceBackend):
    """transformers' wrapper around SentencePiece, with a decoder that puts byte pieces together again (emoji)."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text: SentencePiece decodes each stretch between added tokens, which stand as they are."""
        added = self._added_tokens_encoder
        stretches = groupby(tokens, key=lambda token: token in added)
        return "".join(
            "".join(stretch) if is_added else self.sp_model.decode_pieces(list(stretch))
            for is_added, stretch in stretches
        )


def read_proto(file: Path):
    """The parsed `tokenizer.model`, or None when the file is something else, damaged or not readable."""
    try:
        proto = import_protobuf().ModelProto.FromString(file.read_bytes())
    except (DecodeError, OSError):
        return None
    return proto if proto.pieces and _loads(file) else None


def _loads(file: Path) -> bool:
    try:
        return SentencePieceProcessor().Load(str(file))
    except (RuntimeError, OSError):
        return False


def is_llama_format(proto) -> bool:
    """Byte-pair encoding with the dummy prefix, which is what LLaMA and its descendants use."""
    return proto.trainer_spec.model_type == _BPE and proto.normalizer_spec.add_dummy_prefix


def load_sentencepiece(file: Path) -> SentencePieceTokenizer:
    """A tokenizer over `file` whose bos, eos and unk are the model's own; a published config's empty ones are not read.

    It adds no BOS by itself: the templates write theirs, and a second one would be a token that no model has seen.
    """
    sp = SentencePieceProcessor(str(file))
    names = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
    special = {name: sp.id_to_piece(i) for name, i in names.items() if i >= 0}
    return SentencePieceTokenizer(vocab_file=str(file), clean_up_tokenization_spaces=False, **special)


def to_tokenizer_json(tokenizer: SentencePieceTokenizer, opening: str | None = None) -> Tokenizer:
    """The same encoder for the `tokenizers` library: ids, normalisation, byte fallback and added tokens are equal.

    Every stretch between special tokens gets the dummy prefix, as in our templates. No BOS is added. Where a stretch
    begins with `opening`, no piece reaches from it into what follows: generation cannot produce one there either.
    """
    proto = import_protobuf().ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    unk = proto.pieces[proto.trainer_spec.unk_id].piece
    byte_fallback = proto.trainer_spec.byte_fallback
    model = BPE(vocab=vocab, merges=_merges(proto), unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)
    result = Tokenizer(model)
    result.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    if opening:
        result.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\A▁{opening}"), behavior="isolated")
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    result.add_tokens([AddedToken(piece, normalized=False) for piece in user_defined])
    # In the order of their ids, so that the library numbers the new ones as we do.
    result.add_special_tokens(
        [
            AddedToken(token.content, normalized=False, special=True, lstrip=token.lstrip, rstrip=token.rstrip)
            for _, token in sorted(tokenizer.added_tokens_decoder.items())
        ]
    )
    return result


def _merges(proto) -> list[tuple[str, str]]:
    """All ways to put a piece together from two others, best score first.

    SentencePiece joins the neighbours whose union has the highest score; a merge list says the same by rank. Pieces
    that it never builds by joining (control, byte, unknown, unused) are left out.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(merges, key=lambda pair: (-scores[pair[0] + pair[1]], len(pair[0])))


def _normalizers(spec) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    return [*steps, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
