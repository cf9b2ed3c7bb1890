"""Text on the host: tokenizers, chat templates, datasets, packing, preference pairs. NumPy only, no jax."""

from rlhfjax.data.chat import CHATML, ChatTemplate, EncodedChat, end_of_turn, load_chat_template
from rlhfjax.data.conversations import (
    ChatPair,
    Conversation,
    EncodedChatPairs,
    EncodedConversations,
    EncodedPrompts,
    encode_chat_pairs,
    encode_conversations,
    encode_prompts,
    read_chat_pairs,
    read_conversations,
    read_prompts,
)
from rlhfjax.data.datasets import Pair, batch_indices, load_pairs, read_jsonl
from rlhfjax.data.packing import Encoded, Packed, encode_pairs, pack, pad_completions, pad_prompts
from rlhfjax.data.preferences import (
    PreferencePair,
    Preferences,
    accuracy_ceiling,
    draw_preferences,
    pair_indices,
    read_preferences,
    same_pairs,
    write_preferences,
)
from rlhfjax.data.pretrained_tokenizers import PretrainedTokenizer, load_tokenizer
from rlhfjax.data.tokenizers import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, Tokenizer, train_bpe

__all__ = [
    "CHATML",
    "SPECIAL_TOKENS",
    "BPETokenizer",
    "ByteTokenizer",
    "ChatPair",
    "ChatTemplate",
    "Conversation",
    "Encoded",
    "EncodedChat",
    "EncodedChatPairs",
    "EncodedConversations",
    "EncodedPrompts",
    "Packed",
    "Pair",
    "PreferencePair",
    "Preferences",
    "PretrainedTokenizer",
    "Tokenizer",
    "accuracy_ceiling",
    "batch_indices",
    "draw_preferences",
    "encode_chat_pairs",
    "encode_conversations",
    "encode_pairs",
    "encode_prompts",
    "end_of_turn",
    "load_chat_template",
    "load_pairs",
    "load_tokenizer",
    "pack",
    "pad_completions",
    "pad_prompts",
    "pair_indices",
    "read_chat_pairs",
    "read_conversations",
    "read_jsonl",
    "read_preferences",
    "read_prompts",
    "same_pairs",
    "train_bpe",
    "write_preferences",
]
