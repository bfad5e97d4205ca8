"""What cotrain costs: in time beside another library, and in memory as the catalogue grows."""

import cotrain.teacher  # noqa: F401  silences bitsandbytes before any library imports it
