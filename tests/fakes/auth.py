"""SGLang's API keys (srt/utils/auth.py, since 0.5.8)."""

from dataclasses import dataclass

from tests.fakes.calls import Call, Reply, json_reply

_PUBLIC = ("/health", "/ready")
_NORMAL = ("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/generate", "/openapi.json")


@dataclass(frozen=True, slots=True)
class Keys:
    """--api-key and --admin-api-key."""

    api_key: str | None
    admin_api_key: str | None

    def refusal(self, call: Call) -> Reply | None:
        """The 401 for a call without the key that its path needs. Where an admin key is set, control needs that one."""
        if call.path in _PUBLIC:
            return None
        needed = self.api_key if call.path in _NORMAL else self.admin_api_key or self.api_key
        if needed is None or call.headers.get("authorization") == f"Bearer {needed}":
            return None
        return json_reply(401, {"error": "Unauthorized"})
