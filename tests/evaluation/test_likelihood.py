"""Which tokens of a conversation are the reply that is measured."""

from tiny import word_tokenizer

from toss_lightning.data.formats import Conversation, Message
from toss_lightning.data.tokenize import ChatTokenizer
from toss_lightning.evaluation.likelihood import reply_rows


def test_the_last_reply_of_a_conversation_is_measured_alone() -> None:
    chat = ChatTokenizer(word_tokenizer(), train_on="all")
    said = (("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5"))
    (row,) = reply_rows(chat, [Conversation(tuple(Message(*turn) for turn in said), "here")])
    assert chat.tokenizer.decode(row.input_ids[row.response_positions]) == "w4 w5 <|im_end|>"
