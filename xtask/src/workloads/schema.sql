-- The accounts, :rows of them, and an empty history.
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE setting (rows INTEGER);
INSERT INTO setting VALUES (:rows);
CREATE TABLE account (id INTEGER PRIMARY KEY, branch INTEGER, balance INTEGER, note TEXT);
CREATE TABLE history (id INTEGER PRIMARY KEY, account INTEGER, amount INTEGER, detail TEXT);
WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < :rows)
INSERT INTO account SELECT n, abs(random()) % 100, 0, hex(randomblob(120)) FROM number;
CREATE INDEX account_branch ON account (branch, balance);
