"""From sizes and statistics to a plan."""
