"""The usual names of columns in logs and catalogues of others, and which of them a header has."""

import re

ITEM_NAMES = {  # our column -> other names for it, in lower-case letters and digits only, the likeliest first
    "item_id": "itemid movieid productid articleid parentasin asin sku productsku newsid bookid goodsid trackid videoid item product id",
    "title": "title name itemname productname producttitle itemtitle movietitle productdisplayname prodname headline",
    "description": "description desc productdescription itemdescription detaildesc plot overview abstract",
    "image": "image img picture photo poster imagepath imagefile imagebytes",
    "image_url": "imageurl imgurl imgurls pictureurl photourl posterurl imagelink",
    "available_from": "availablefrom",
    "available_until": "availableuntil",
}
EVENT_NAMES = {
    "session_id": "sessionid session usersession gasessionid sid visitid",
    "user_id": "userid user visitorid visitor customer client userpseudoid fullvisitorid customerid memberid reviewerid clientid uid",
    "item_id": ITEM_NAMES["item_id"].removesuffix(" id"),
    "timestamp": "timestamp eventtimestamp time ts datetime eventtime unixtime unixreviewtime createdat eventdate date tdat",
    "position": "position pos step sequence order timeframe",
    "history": "",
}
ROLES = {"sessions": EVENT_NAMES, "items": ITEM_NAMES}


def candidates(names: list[str], label: str, role: str) -> list[str]:
    """Returns the columns of sessions or items that may be `role`, the likeliest first: of the same name, else of another known name."""
    by_name: dict[str, str] = {}
    for column in names:
        by_name.setdefault(re.sub("[^a-z0-9]", "", column.lower()), column)
    known = [by_name[other] for other in ROLES[label][role].split() if other in by_name]
    return list(dict.fromkeys([role, *known] if role in names else known))


def is_header(names: list[str], label: str, given: dict[str, str]) -> bool:
    """Returns whether names of columns are all that `sessions` or `items` need; `given`: our column -> the file's."""

    def has(role: str) -> bool:
        return given.get(role, "").partition("/")[0] in names or bool(candidates(names, label, role))

    return has("item_id") or (label == "sessions" and (has("history") or (has("session_id") and has("timestamp"))))
