"""What features are about: users and items, keyed by their raw ids."""

from feast import Entity, ValueType

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING, description="Who interacts.")
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING, description="What is interacted with.")
