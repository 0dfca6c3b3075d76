"""The packages here are projects of their own: `.ci/examples` installs them and runs their tests."""

collect_ignore_glob = ["agent-chat-*"]
