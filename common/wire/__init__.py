"""Messages on their way: frames, codec, typed sockets and the addresses of peers."""
