"""A teacher's tokenizer without its weights, for what needs no more."""

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from cotrain.assets import resolve_model
from cotrain.errors import TeacherError


def load_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, int]:
    """Tokenizer of a teacher, and the longest context of its model in tokens.

    Raises:
        AssetError: A folder that holds no model, or an asset that cannot be fetched.
        TeacherError: There is no tokenizer.
    """
    source = resolve_model(name)
    try:
        model = AutoConfig.from_pretrained(source).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"The tokenizer of teacher.model {name!r} cannot be loaded: {error}\nExpected a known "
            "asset, a folder written by save_pretrained with its tokenizer, or the name of such a "
            "model on the hub."
        ) from error
    limit = getattr(model, "max_position_embeddings", None)
    return tokenizer, limit or tokenizer.model_max_length
