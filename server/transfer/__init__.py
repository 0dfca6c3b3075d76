"""`agent-chat import` and `agent-chat export`: threads with their messages as newline-delimited JSON.

`lines` has the format, `importer` and `exporter` one direction each, `references` the names of users and agents that
stand in files in place of ids. `ai_chat_service.md` describes the format for people.
"""
