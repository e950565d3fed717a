"""LLaMA-format `tokenizer.model` files: encodes with SentencePiece, and exports a `tokenizer.json` with the same ids.

transformers' LLaMA class ignores the scores of pieces, and so encodes runs of spaces and code differently from the
tokenizer that the published weights were trained with.
"""

import math
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
    """transformers' wrapper of SentencePiece, with a decoder that joins byte pieces (emoji)."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of tokens: SentencePiece decodes the parts between added tokens, which are kept verbatim."""
        added = self._added_tokens_encoder
        parts = groupby(tokens, key=lambda token: token in added)
        decode = self.sp_model.decode_pieces
        return "".join("".join(part) if is_added else decode(list(part)) for is_added, part in parts)


def read_proto(file: Path):
    """Returns the parsed `tokenizer.model`, None if the file is something else, damaged or not readable."""
    try:
        proto = import_protobuf().ModelProto.FromString(file.read_bytes())
        loads = SentencePieceProcessor().Load(str(file))
    except (DecodeError, OSError, RuntimeError, ValueError):
        return None
    sound = 0 <= proto.trainer_spec.unk_id < len(proto.pieces) and all(math.isfinite(x.score) for x in proto.pieces)
    return proto if loads and sound else None


def is_llama_format(proto) -> bool:
    """Whether a model is byte-pair encoding with a dummy prefix, as LLaMA's."""
    return proto.trainer_spec.model_type == _BPE and proto.normalizer_spec.add_dummy_prefix


def load_sentencepiece(file: Path) -> SentencePieceTokenizer:
    """Returns a tokenizer with the model file's own bos, eos and unk (published configs have none). Adds no BOS."""
    sp = SentencePieceProcessor(str(file))
    names = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
    special = {name: sp.id_to_piece(i) for name, i in names.items() if i >= 0}
    return SentencePieceTokenizer(vocab_file=str(file), clean_up_tokenization_spaces=False, **special)


def to_tokenizer_json(tokenizer: SentencePieceTokenizer, opening: str | None = None) -> Tokenizer:
    """Returns an equal encoder of the `tokenizers` library: same ids, normalisation, byte fallback and added tokens.

    Each part between special tokens gets the dummy prefix, as in our templates. If a part begins with `opening`, no
    piece crosses the end of `opening`, as in generation.
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
    # In the order of their ids, so that the library gives new tokens the same ids.
    result.add_special_tokens(
        [
            AddedToken(token.content, normalized=False, special=True, lstrip=token.lstrip, rstrip=token.rstrip)
            for _, token in sorted(tokenizer.added_tokens_decoder.items())
        ]
    )
    return result


def _merges(proto) -> list[tuple[str, str]]:
    """Returns all pairs of pieces whose union is a piece, highest score first.

    SentencePiece merges the neighbours whose union has the highest score; a merge list encodes this order as ranks.
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
