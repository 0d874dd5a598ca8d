"""What tokens write, where a text ends, and chats as tokens."""
