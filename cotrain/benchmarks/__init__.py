"""What cotrain costs: in time beside another library, and in memory as the catalogue grows."""
