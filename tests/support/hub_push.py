"""What a hub does with a push: make a repository, say how files come, take them, commit them."""

import base64
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.hub_server import Hub

PUSH = re.compile(
    r"/(api/models/)?(?P<repo>[^/]+/[^/]+?)"
    r"(/(?P<what>preupload|commit)/main|\.git/info/lfs/objects/(?P<batch>batch))"
)


def take(hub: "Hub", path: str, body: bytes) -> dict[str, Any] | None:
    """Return the answer to a POST; None where there is no such repository."""
    if path == "/api/repos/create":
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        hub.pushed.setdefault(name, {})
        return {"url": f"{hub.url}/{name}"}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    match = PUSH.fullmatch(path)
    if match is None or match["repo"] not in hub.pushed:
        return None
    if match["batch"]:
        return {
            "transfer": "basic",
            "objects": [_offer(hub, o) for o in json.loads(body)["objects"]],
        }
    if match["what"] == "preupload":
        return {"files": [_mode(file["path"]) for file in json.loads(body)["files"]]}
    _commit(hub, match["repo"], [json.loads(line) for line in body.splitlines()])
    url = f"{hub.url}/{match['repo']}/commit/{'f' * 40}"
    return {"success": True, "commitOid": "f" * 40, "commitUrl": url}


def listing(hub: "Hub", repo: str, *, tree: bool) -> object:
    """What a push may ask of the repository it goes to."""
    files = hub.pushed[repo].items()
    if tree:
        return [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files]
    return {"id": repo, "sha": "e" * 40, "siblings": [{"rfilename": name} for name, _ in files]}


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


def _offer(hub: "Hub", wanted: dict[str, Any]) -> dict[str, Any]:
    """Where a large file is to be sent, unless it is there."""
    offer = {"oid": wanted["oid"], "size": wanted["size"]}
    if wanted["oid"] in hub.objects:
        return offer
    return {**offer, "actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}


def _commit(hub: "Hub", repo: str, lines: list[dict[str, Any]]) -> None:
    files = dict(hub.pushed[repo])
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    hub.pushed[repo] = files
